"""Logs of the service's processes: JSON lines, in rotated files under `<home>/logs`, or on stderr in a container.

Whoever logs about a job hands in `extra=about(...)`, so that
its lines can be found by `job` and `attempt`.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler

from orchestrator.api.words import in_json
from orchestrator.settings import Settings

CONTEXT = ("job", "attempt")


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, and the traceback where there is one."""
        time = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= {name: getattr(record, name) for name in CONTEXT if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return in_json(json.dumps(line, ensure_ascii=False))


def log_to_file(settings: Settings, program: str) -> None:
    """Makes this process log to `<home>/logs/<program>.jsonl`."""
    settings.logs_folder.mkdir(parents=True, exist_ok=True)
    path = settings.logs_folder / f"{program}.jsonl"
    handler = RotatingFileHandler(path, maxBytes=settings.log_bytes, backupCount=settings.log_files)
    _log_to(handler)


def log_to_stderr() -> None:
    """Makes this process log to stderr, where a container's logs are collected."""
    _log_to(logging.StreamHandler(sys.stderr))


def about(job: str, attempt: int | None = None) -> dict[str, str | int]:
    """Which job (`namespace/name`) and which of its attempts a line is about."""
    return {"job": job} if attempt is None else {"job": job, "attempt": attempt}


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
