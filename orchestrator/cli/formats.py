"""The values of `--output`. Apart from the printing, so that reading options imports nothing."""

from __future__ import annotations

from enum import StrEnum


class DataFormat(StrEnum):
    """How an answer for programs is written."""

    JSON = "json"
    YAML = "yaml"


class TableFormat(StrEnum):
    """How `qlora get` answers."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class UsageFormat(StrEnum):
    """How `qlora usage` answers."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    YAML = "yaml"


class UsageOf(StrEnum):
    """What a line of `qlora usage` is of."""

    USER = "user"
    QUEUE = "queue"
    JOB = "job"


class Kind(StrEnum):
    """What `qlora get` lists."""

    JOBS = "jobs"
    QUEUES = "queues"


class Stage(StrEnum):
    """A job's stages."""

    PREPARE = "prepare"
    TRAIN = "train"
    PUBLISH = "publish"
