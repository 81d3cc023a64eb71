"""Logs of the service's processes: JSON lines in rotated files under `<home>/logs`.

`program` and `supervisor` set them up; everything else only logs.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler

from orchestrator.settings import Settings


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, and the traceback where there is one."""
        time = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_file(settings: Settings, program: str) -> None:
    """From here on this process logs to `<home>/logs/<program>.jsonl`."""
    settings.logs_folder.mkdir(parents=True, exist_ok=True)
    path = settings.logs_folder / f"{program}.jsonl"
    handler = RotatingFileHandler(path, maxBytes=settings.log_bytes, backupCount=settings.log_files)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
