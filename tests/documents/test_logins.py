"""The logins of `docs/logins.md` on one machine: its blocks as they stand, and a job that needs all three.

The servers are a hub with a gated model, a server of the S3 protocol, and a real MLflow behind a line that speaks TLS
with a certificate of its own and lets nobody pass without the login.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.resources import require
from tests.documents.blocks import blocks_of
from tests.servers import certificate
from tests.trainer.fake_hub import Repository
from tests.trainer.fake_hub import serve as model_hub
from tests.trainer.fault_link import Link, Refusal, Request, fault_link
from tests.trainer.mlflow_server import free_port, mlflow_server
from tests.trainer.s3_server import ACCESS, SECRET, s3_server
from tests.trainer.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(900)
TOKEN, USER, PASSWORD = "hf_a-token-of-tests", "ada", "a-password-of-tests"
JOB = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: guarded}
spec:
  model: {source: "hf://acme/guarded"}
  dataset: {source: "file://./train.jsonl", format: prompt-completion}
  adapter: {rank: 4}
  training: {epochs: 1, sequenceLength: 128, globalBatchSize: 8}
"""
REFUSED = Refusal(status=401, body=b"who are you?", kind="text/plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """What asks for a login."""

    folder: Path
    hub: str
    bucket: Path
    s3: str
    mlflow: Link


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    require("versitygw")
    folder, port = tmp_path_factory.mktemp("logins"), free_port()
    authority, pair = certificate(folder)
    (folder / "ca.crt").write_bytes(authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    guarded = Repository(folder=tiny_model(), gated=True, token=TOKEN)
    with ExitStack() as stack:
        hub, _ = stack.enter_context(model_hub({"acme/guarded": guarded}))
        bucket = stack.enter_context(s3_server(folder / "s3"))
        (folder / "mlflow").mkdir()
        stack.enter_context(mlflow_server(folder / "mlflow", port))
        mlflow = stack.enter_context(fault_link("127.0.0.1", port, tls=context))
        mlflow.rule = only_with_login
        yield Servers(folder=folder, hub=hub, bucket=bucket.bucket, s3=f"http://127.0.0.1:{bucket.port}", mlflow=mlflow)


def only_with_login(request: Request) -> Refusal | None:
    login = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
    return None if request.authorization == login else REFUSED


def exports(servers: Servers) -> str:
    """The blocks that export, with what these servers ask for in the place of what stands for it."""
    text = "".join(block.text for block in blocks_of("docs/logins.md") if block.detail == "logins")
    names = {"HF_TOKEN": TOKEN, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
    names |= {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    for name, value in names.items():
        text, count = re.subn(rf"{name}=(hf_)?YOURS", f"{name}={value}", text)
        assert count == 1, name
    assert "YOURS" not in text
    return text.replace("https://s3.example.com", servers.s3).replace("https://mlflow.example.com", servers.mlflow.url)


def bash(script: str, servers: Servers) -> subprocess.CompletedProcess[str]:
    """A shell of somebody who has a job, in a home of their own."""
    folder = servers.folder
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("QLORA_", "MLFLOW", "AWS_", "HF_")) and "proxy" not in name.lower()
    }
    environment: Mapping[str, str] = {
        **kept,
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_ENDPOINT": servers.hub,
        "OMP_NUM_THREADS": "1",
        "QLORA_GPU_CLASSES": "cpu=1",
    }
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=600
    )


def test_a_job_that_needs_every_login_runs_with_what_the_page_exports(servers: Servers) -> None:
    folder = servers.folder
    (folder / "home").mkdir()
    (folder / "job.yaml").write_text(JOB)
    (folder / "train.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n' * 16)
    without = bash("qlora plan job.yaml", servers)
    assert without.returncode != 0
    assert "access is gated; accept its terms on the hub and set HF_TOKEN" in without.stderr
    done = bash(f"{exports(servers)}\nqlora plan job.yaml\nqlora run job.yaml; qlora logs guarded; qlora down", servers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Succeeded" in done.stdout, done.stdout + done.stderr
    assert len(servers.mlflow.seen) > 20
    assert servers.mlflow.faults == 0, "everybody has the login"
    assert any(servers.bucket.rglob("adapter_model.safetensors"))
    told = {"the commands": (done.stdout + done.stderr).encode()}
    written = [path for place in (folder / "home", servers.bucket, folder / "mlflow") for path in place.rglob("*")]
    told |= {str(path): path.read_bytes() for path in written if path.is_file() and not path.is_symlink()}
    assert len(told) > 20
    assert [
        place for place, content in told.items() for secret in (TOKEN, SECRET, PASSWORD) if secret.encode() in content
    ] == []
