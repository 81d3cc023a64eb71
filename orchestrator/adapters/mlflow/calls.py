"""Calls of MLflow, each with a bound on its time: what it does not answer in time counts as away.

Calls may take long, and are safe from several threads. Only this folder of `orchestrator` imports mlflow, which takes
seconds, so it does that with the first call.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from orchestrator.api.tracking_login import read_login
from orchestrator.api.words import without_logins
from orchestrator.errors import InvalidObject, TrackingUnavailable

Answer = TypeVar("Answer")


class TrackingSettings(Protocol):
    """What it needs to know."""

    @property
    def tracking_uri(self) -> str:
        """The tracking and registry URI."""
        ...

    @property
    def artifact_root(self) -> Path | None:
        """Artifacts of experiments that are created here; MLflow's own choice by default."""
        ...

    @property
    def tracking_timeout_seconds(self) -> float:
        """How long MLflow may take to answer."""
        ...

    @property
    def tracking_start_seconds(self) -> float:
        """How long it may take to load, and to make the tables of a new database."""
        ...

    @property
    def mlflow_workers(self) -> int:
        """Calls that it may have to answer at one time."""
        ...


class MlflowCalls:
    """Of one MLflow server or database, so many at one time as the settings say."""

    def __init__(self, settings: TrackingSettings) -> None:
        self._settings = settings
        self._client: Any = None  # Any: mlflow is imported late
        self._connecting = threading.Lock()
        self._free = threading.BoundedSemaphore(settings.mlflow_workers)

    def connected(self) -> Any:
        """MLflow's client: first of all calls, because no two threads may import parts of mlflow at one time."""
        with self._connecting:
            return self._connect()

    def _connect(self) -> Any:
        read_login(os.environ)
        if self._client is None:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(self._settings.tracking_timeout_seconds)))
            # The caller tries again: a client that does by itself makes a second run when an answer is lost.
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            mlflow: Any = importlib.import_module("mlflow")
            self._client = mlflow.MlflowClient(self._settings.tracking_uri, self._settings.tracking_uri)
        return self._client

    def answered(self, call: Callable[[], Answer], timeout_seconds: float | None = None) -> Answer:
        """The answer of one of the calls at a time, or TrackingUnavailable once its time is over."""
        seconds = timeout_seconds or self._settings.tracking_timeout_seconds
        where = without_logins(self._settings.tracking_uri)
        if not self._free.acquire(blocking=False):
            raise TrackingUnavailable(f"MLflow at {where} still owes an answer to earlier calls")
        answer: Future[Answer] = Future()

        def carry_out() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it can be handled
                answer.set_exception(error)
            finally:
                self._free.release()

        threading.Thread(target=carry_out, name="mlflow call", daemon=True).start()
        try:
            return answer.result(seconds)
        except TimeoutError as error:
            raise TrackingUnavailable(f"MLflow at {where} did not answer within {seconds:g} s") from error
        except InvalidObject:
            raise
        except Exception as error:
            raise TrackingUnavailable(
                f"MLflow at {where} failed: {without_logins(str(error))}; check MLFLOW_TRACKING_URI"
            ) from error
