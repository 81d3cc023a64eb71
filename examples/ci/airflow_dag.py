"""A DAG of Airflow 3 that trains every week: one task submits, one waits and ends as the job does.

`qlora` is installed where tasks run (`pip install "qlora-orchestrator[kubernetes]"`), with a kubeconfig of an account
with the role of submitters. The job goes on whatever becomes of the task that waits; one that is tried again waits for
it again.
"""

from __future__ import annotations

from datetime import datetime

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

SUBMIT = 'qlora submit "$MANIFEST" --replace'
WAIT = """
status=4
while [ "$status" -eq 4 ]; do  # the service did not answer
  status=0
  qlora wait "$JOB" || status=$?
  [ "$status" -ne 4 ] || sleep "$PAUSE_SECONDS"
done
exit "$status"
"""
ENVIRONMENT = {
    "JOB": "medical",
    "MANIFEST": "/opt/jobs/medical.yaml",
    "PAUSE_SECONDS": "60",
    "QLORA_CONTEXT": "current",
}

with DAG("train_medical", schedule="@weekly", start_date=datetime(2026, 1, 5), catchup=False, max_active_runs=1):
    submit = BashOperator(task_id="submit", bash_command=SUBMIT, env=ENVIRONMENT, append_env=True)
    wait = BashOperator(task_id="wait", bash_command=WAIT, env=ENVIRONMENT, append_env=True, retries=2)
    submit >> wait
