"""MLflow's login from files, as pods have it: the keys of a Secret in a folder, in which a rotation changes them.

MLflow's client takes a login from the environment alone, and reads that with every request.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

LOGIN_FOLDER_VARIABLE = "QLORA_TRACKING_LOGIN_FOLDER"
"""Path of the folder; unset where the environment has the login itself, or there is none."""
LOGIN_VARIABLES = {
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
    "token": "MLFLOW_TRACKING_TOKEN",
}
"""Files of the folder, each of which may be missing -> MLflow's variables."""


def read_login(environment: MutableMapping[str, str]) -> None:
    """Put the login as it is now into the environment."""
    folder = environment.get(LOGIN_FOLDER_VARIABLE)
    if not folder:
        return
    for name, variable in LOGIN_VARIABLES.items():
        try:
            environment[variable] = (Path(folder) / name).read_text().strip()
        except FileNotFoundError:
            environment.pop(variable, None)
