"""Settings of the service, and those of the embedded one: read from the environment (12-factor), documented from here.

Every field is the environment variable `QLORA_<FIELD>`; the tracking URI also answers to MLflow's own variable. Every
bound, tick and timeout of the service has its name here, and what decisions depend on goes into `core.snapshot.Policy`
unchanged. A program builds its `Settings` once and hands it down.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestrator.api.base import StoreUri
from orchestrator.api.job import MAX_EVICTIONS
from orchestrator.api.uris import file_uri
from orchestrator.core.job.addresses import AddressRules
from orchestrator.core.snapshot import Policy
from orchestrator.sizing.gpu_table import gpu_table

MAX_RUNTIME_CHARACTERS = 16
"""Of XDG_RUNTIME_DIR, `/run/user/1000` as a rule: Ray's sockets lie deep below it."""
ENVIRONMENT_PREFIX = "QLORA_"
GPU_PRICES_PATTERN = r"^([1-9][0-9]{0,3}Gi=[0-9]{1,6}(\.[0-9]{1,6})?(,[1-9][0-9]{0,3}Gi=[0-9]{1,6}(\.[0-9]{1,6})?)*)?$"
GPU_CLASSES_PATTERN = r"^((cpu|[1-9][0-9]{0,3}Gi)=[0-9]{1,4}(,(cpu|[1-9][0-9]{0,3}Gi)=[0-9]{1,4})*)?$"

_HOST = r"(\*\.)?[A-Za-z0-9:]([-A-Za-z0-9.:]*[A-Za-z0-9:])?"
HOSTS_PATTERN = f"^({_HOST}(,{_HOST})*)?$"

Seconds = Annotated[float, Field(gt=0, le=86_400)]
GpuPricesText = Annotated[str, StringConstraints(pattern=GPU_PRICES_PATTERN)]
HostsText = Annotated[str, StringConstraints(pattern=HOSTS_PATTERN, max_length=16_384)]
GpuClassesText = Annotated[str, StringConstraints(pattern=GPU_CLASSES_PATTERN)]
GpuDefinitionsText = Annotated[
    str, StringConstraints(max_length=65_536), AfterValidator(lambda text: _of_classes(text))
]
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


def _of_classes(text: str) -> str:
    """The same text, which makes a table of GPU classes; ValueError names what is wrong with it."""
    gpu_table(text)
    return text


def _absolute_uri(uri: str) -> str:
    """A database or folder that is named relative to here, so that other processes find it, too."""
    scheme, separator, rest = uri.partition(":///")
    if scheme == "sqlite" and separator and not rest.startswith("/"):
        return f"sqlite:///{Path(rest).absolute()}"
    return uri if ":" in uri else Path(uri).absolute().as_uri()


def _user_runtime_folder() -> Path | None:
    """The folder of XDG_RUNTIME_DIR, where it is there and this user's: `sudo` may hand on another's."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    if not named.startswith("/") or len(named) > MAX_RUNTIME_CHARACTERS:
        return None
    try:
        found = Path(named).stat()
    except OSError:
        return None
    return Path(named) if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() else None


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


class ServiceSettings(BaseSettings):
    """How the service decides, whatever it runs on."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    grace_seconds: int = Field(default=120, ge=1, le=86_400)
    """Seconds between asking a stage to stop and killing it."""
    checkpoint_lag_seconds: Seconds = 900.0
    """A checkpoint goes to the store while training goes on; training waits for one that has not arrived for so long,
    or that has not when the next one is due."""
    backoff_base_seconds: Seconds = 10.0
    """Wait before a failed stage is tried again; doubles with every failure."""
    backoff_max_seconds: Seconds = 600.0
    """Longest wait before a failed stage is tried again."""
    outage_limit_seconds: float = Field(default=21_600.0, ge=1, le=31_536_000)
    """How long store, registry, nodes and the like may keep a job from progress before it fails, unless its spec says
    otherwise; waiting for a GPU does not count."""
    outage_jobs: int = Field(default=3, ge=2, le=100_000)
    """So many jobs that fail for the same cause are an outage: nobody's limit is spent, and one job at a time tries."""
    outage_window_seconds: Seconds = 900.0
    """An outage is over when nobody has failed for its cause for so long, or somebody got through."""
    outage_probe_seconds: Seconds = 120.0
    """A stage that has run for so long has got through."""
    avoid_seconds: float = Field(default=1800.0, ge=0, le=86_400)
    """A node with a broken card, or a class whose nodes took no pod, is passed over for so long."""
    creation_limit_seconds: Seconds = 300.0
    """An attempt of which no stage has come for so long is given up, and its GPU with it."""
    release_limit_seconds: Seconds = 3600.0
    """A finished job that is deleted is let go after so long even if MLflow has not taken the end of its run."""
    stall_seconds: Seconds = 1800.0
    """A stage that trains is stopped and resumed after so long without a step, or more where its steps take long."""
    stall_start_seconds: Seconds = 14_400.0
    """The same before its first step: the model is fetched and loaded."""
    stall_steps: int = Field(default=20, ge=2, le=100_000)
    """A stage is stuck after so many times a step's length, and an evaluation's, without a step."""
    host_memory_factor_max: float = Field(default=4.0, ge=1, le=64)
    """How far a stage's host memory is raised, by doubling, after it has run out."""
    minimum_run_seconds: float = Field(default=300.0, ge=0, le=86_400)
    """A start counts in fair share for at least so long."""
    restart_cost_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """GPU seconds that a move is taken to cost on top of the work since the last checkpoint."""
    stop_cost_seconds: float = Field(default=30.0, ge=0, le=86_400)
    """How long it is taken to last from asking a stage to stop until its GPU is free. A job that ends sooner is waited
    for, and one that ends sooner than stop and restart together is moved by nobody; 0 of both: nobody is waited for."""
    preemption_cooldown_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """A job that was just evicted is not chosen again for so long after it restarted."""
    max_evictions: int = Field(default=0, ge=0, le=MAX_EVICTIONS)
    """How often a job that has no `spec.evictionBudget` may be moved for others' sake; 0: without bound."""
    eviction_window_seconds: float = Field(default=86_400.0, ge=3_600, le=31_536_000)
    """Only evictions within so long count in that."""
    eviction_protection_seconds: float = Field(default=3_600.0, ge=0, le=604_800)
    """A job whose eviction budget is spent keeps a GPU for so long before it may be moved again: whoever has a right to
    that GPU waits no longer for it. 0: budgets protect nobody."""
    defragmentation_gain: float = Field(default=0.0, ge=0, le=1_000)
    """A job that may change its class is moved from a large card to a free smaller one, where another then starts
    sooner by so many times what the move costs; 0: nobody is moved for that."""
    history_limit: int = Field(default=32, ge=1, le=64)
    """Attempts kept in a job's status."""
    usage_half_life_seconds: float = Field(default=604_800.0, ge=3_600, le=315_360_000)
    """GPU time that a queue has had counts for half after so long in whose turn it is; a week by default."""
    usage_write_seconds: Seconds = 30.0
    """What a queue's jobs have had is written to its status so often while they hold GPUs, and when one comes free."""
    gpu_prices: GpuPricesText = ""
    """Dollars for an hour of a GPU, by class, such as `24Gi=0.5,48Gi=0.8`: what a job will cost, and which class is the
    cheapest that makes its deadline."""
    gpu_class_definitions: GpuDefinitionsText = ""
    """GPU classes beside those that are built in, as JSON such as `{"23Gi": {"usableMiB": 22016, "cards":
    ["NVIDIA-L4"]}}`: they take the cards that they name out of the class of their memory."""
    cpu_stages_limit: int = Field(default=4, ge=1, le=1024)
    """Prepare and publish stages that may run at one time, and one more of a namespace that has none."""
    cpu_start_seconds: Seconds = 60.0
    """A prepare or publish stage that has not started after so long (its claim is missing, no node takes it) holds no
    slot while it waits."""
    prepare_deadline_seconds: Seconds = 21_600.0
    """A prepare stage that runs for longer is stopped, and its job fails."""
    publish_deadline_seconds: Seconds = 21_600.0
    """A publish stage that runs for longer is stopped, and tried again within `spec.backoffLimit`."""
    progress_interval_seconds: float = Field(default=1.0, ge=0, le=3600)
    """A running job's progress is recorded at most so often; the end of a stage always is."""
    tick_seconds: Seconds = 1.0
    """The controller looks at the world at least so often; changes of objects wake it at once."""
    tick_minimum_seconds: float = Field(default=0.1, ge=0, le=60)
    """The controller rests at least so long between two looks."""
    command_backoff_base_seconds: Seconds = 1.0
    """Wait before a command that met a transient error is tried again; doubles with every failure."""
    command_backoff_max_seconds: Seconds = 60.0
    """Longest wait before a command is tried again."""
    round_act_seconds: Seconds = 1.0
    """A round begins nothing more after so long, or four times its look at things; the rest is decided anew."""
    words_limit: int = Field(default=100, ge=1, le=100_000)
    """Jobs of which one round says something new while nothing else about them changes, such as why they wait."""
    words_per_second: float = Field(default=2.0, gt=0, le=10_000)
    """Such words are written about so many jobs a second, and a minute's worth of them at once after a pause."""
    mlflow_workers: int = Field(default=1, ge=1, le=64)
    """Calls that MLflow is asked to answer at one time."""
    tracking_timeout_seconds: Seconds = 30.0
    """How long MLflow may take to answer before it counts as away."""
    tracking_start_seconds: Seconds = 90.0
    """How long MLflow may take to load, and to make the tables of a new database, before the controller goes on."""

    webhook_allowed_hosts: HostsText = ""
    """Hosts that webhooks may name whatever their addresses, and by `http://`: names, separated by commas, or `*.` and
    what names end in. Others have to be `https://` with a public address."""
    webhook_workers: int = Field(default=8, ge=1, le=64)
    """Webhooks that are told something at one time, one of a namespace or queue."""
    webhook_timeout_seconds: Seconds = 15.0
    """How long a webhook may take to answer."""
    webhook_backoff_base_seconds: Seconds = 5.0
    """Wait before a webhook that did not take something is tried again; doubles with every failure."""
    webhook_backoff_max_seconds: Seconds = 3600.0
    """Longest wait before a webhook is tried again."""
    webhook_limit_seconds: float = Field(default=259_200.0, ge=1, le=31_536_000)
    """What a webhook has not taken for so long is given up; three days by default."""

    page_read_seconds: Seconds = 1.0
    """The page reads jobs, queues and cards at most so often, however many look at it, and only while somebody does."""
    page_refresh_seconds: float = Field(default=5.0, ge=1, le=3_600)
    """A page that is open shows what is new so often."""
    page_forecast_seconds: Seconds = 10.0
    """The page works out when jobs start and end at most so often, and rests ten times as long as that takes."""
    page_forecast_events: int = Field(default=100, ge=1, le=10_000)
    """It looks no further ahead than so many jobs that end."""
    page_mlflow_seconds: Seconds = 5.0
    """The page asks MLflow for a run's figures at most so often."""
    page_mlflow_timeout_seconds: Seconds = 3.0
    """A page waits no longer for MLflow, and is then shown without its figures."""
    page_runs_kept: int = Field(default=64, ge=1, le=10_000)
    """Runs whose figures the page remembers."""
    page_requests_limit: int = Field(default=64, ge=1, le=10_000)
    """Requests that the page answers at one time; it refuses others."""
    page_mlflow_url: Annotated[str, StringConstraints(pattern=r"^(https?://[^\s\"'<>]+)?$", max_length=2048)] = ""
    """Where browsers find MLflow, for links; default: the tracking URI, where that is a server's."""

    @property
    def has_agents(self) -> bool:
        """Whether somebody beside each trainer passes its reports on."""
        return True

    @property
    def addresses(self) -> AddressRules:
        """Which URIs jobs may name: on one's own machine, any."""
        return AddressRules()

    def policy(self) -> Policy:
        """What decisions depend on."""
        return Policy(**{field.name: getattr(self, field.name) for field in fields(Policy)})


class Settings(ServiceSettings):
    """Where the embedded service lives and how it behaves."""

    context: str = Field(default="", max_length=253)
    """Which service the CLI and the SDK talk to: a kubeconfig context, `current`, or empty for the embedded one."""
    home: AbsolutePath = Path("~/.local/share/qlora-orchestrator")
    """Folder of everything that the embedded service keeps: objects, stages, logs, and by default data and results."""
    store_uri: StoreUri = Field(default_factory=lambda known: file_uri((known["home"] / "store").absolute()))
    """Where jobs that name no store keep their data; default `file://<home>/store`."""
    tracking_uri: Annotated[str, AfterValidator(_absolute_uri)] = Field(
        default_factory=lambda known: f"sqlite:///{known['home']}/mlflow.db",
        validation_alias=AliasChoices("QLORA_TRACKING_URI", "MLFLOW_TRACKING_URI"),
    )
    """The MLflow tracking and registry URI (also `MLFLOW_TRACKING_URI`); default `sqlite:///<home>/mlflow.db`."""
    artifact_root: AbsolutePath = Field(default_factory=lambda known: known["home"] / "mlartifacts")
    """Artifacts of experiments that the service creates, unless MLflow is a server; default `<home>/mlartifacts`."""
    gpu_classes: GpuClassesText = ""
    """GPU slots such as `24Gi=2,cpu=1`. Empty: the cards that NVML reports, or one `cpu` slot where there are none."""
    trainer_command: str = f"{shlex.quote(sys.executable)} -m qlora_trainer"
    """The command of a stage; the stage's name is appended."""

    page_port: int = Field(default=5001, ge=0, le=65_535)
    """Port of `qlora page` on 127.0.0.1; 0 is any that is free."""

    gpu_classes_are_fixed: bool = True
    """No other GPU can appear later: a job that fits none of them fails at once instead of waiting."""
    restart_cost_seconds: float = Field(default=5.0, ge=0, le=86_400)
    """GPU seconds that a move is taken to cost: here no image is fetched and no pod waited for."""
    stop_cost_seconds: float = Field(default=2.0, ge=0, le=86_400)
    """How long a stage that is asked to stop is taken to need; a job that ends before it has moved is not moved."""
    trainer_threads: int = Field(default_factory=_usable_cpus, ge=1, le=1024)
    """CPU threads of each stage; part of what makes results repeatable. Default: the CPUs this process may use."""

    store_busy_seconds: Seconds = 10.0
    """How long a writer waits for another writer of the object database."""
    store_poll_seconds: Seconds = 0.1
    """How often a waiting reader asks the object database whether anything changed."""
    events_limit: int = Field(default=100, ge=1, le=10_000)
    """Events kept for each job, newest first to stay."""
    stage_logs_limit: int = Field(default=1000, ge=1, le=1_000_000)
    """Logs of ended stages kept, newest first to stay."""
    ray_start_seconds: Seconds = 120.0
    """How long Ray may take to start."""
    ray_answer_seconds: Seconds = 20.0
    """How long Ray may take to answer before the controller starts over with a new one."""
    ray_object_store_bytes: int = Field(default=80 * 2**20, ge=80 * 2**20)
    """Ray's shared memory; the service passes next to nothing through it."""
    ray_sessions_limit: int = Field(default=3, ge=1, le=100)
    """Ray session folders (its own logs) kept."""
    restart_backoff_base_seconds: Seconds = 0.5
    """Wait before a controller that ended is started again; doubles while it keeps ending early."""
    restart_backoff_max_seconds: Seconds = 30.0
    """Longest wait before the controller is started again."""
    start_timeout_seconds: Seconds = 180.0
    """How long `up` waits for the controller's first decision."""
    stop_timeout_seconds: Seconds = 20.0
    """How long `down` waits for the controller to end before it kills it."""
    log_bytes: int = Field(default=10 * 2**20, ge=2**16)
    """Size at which a log of the service is rotated."""
    log_files: int = Field(default=5, ge=1, le=100)
    """Rotated logs kept."""

    def environment(self) -> dict[str, str]:
        """The variables that make another process read these very settings."""
        dumped: dict[str, Any] = self.model_dump(mode="json")  # Any: a JSON value of any field
        return {f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value) for name, value in dumped.items()}

    @property
    def known_tracking_uri(self) -> str | None:
        """Where this machine finds the results in MLflow; None of a cluster's, unless somebody has said it."""
        is_said = "tracking_uri" in self.model_fields_set
        return self.tracking_uri if is_said or not self.context else None

    @property
    def database(self) -> Path:
        """The object database."""
        return self.home / "objects.db"

    @property
    def stages_folder(self) -> Path:
        """One folder a stage: `<namespace>/<name>/`."""
        return self.home / "stages"

    @property
    def runtime_folder(self) -> Path:
        """Sockets, and Ray's session folders; short, because a unix socket's path has at most 107 bytes.

        In XDG_RUNTIME_DIR, which nobody sweeps while its user is logged in, or else in the temporary folder.
        """
        digest = hashlib.sha256(bytes(self.home)).hexdigest()[:8]
        return (_user_runtime_folder() or Path(tempfile.gettempdir())) / f"qlora-{os.getuid()}-{digest}"

    @property
    def sockets_folder(self) -> Path:
        """The agents' sockets, one a running stage."""
        return self.runtime_folder / "agents"

    @property
    def logs_folder(self) -> Path:
        """Logs of the service, and of stages in `stages/<namespace>/<name>.log`."""
        return self.home / "logs"
