"""QLoRAJob: what a user asks for (spec) and what came of it (status).

The spec's defaults are the published QLoRA recipe (Dettmers et al., 2023, section 4 and appendix B): rank 64 and
alpha 16 on all linear layers, constant learning rate 2e-4, global batch 16, gradient norm 0.3, Adam beta2 0.999.
Static rules live here, and in CEL in `crd`; one table of cases is tried on both. They compare decimals as floats,
which is what the trainer and CEL make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel

from orchestrator.api.adapter import TAKEN_OVER, AdapterSpec, StartingJob
from orchestrator.api.base import (
    API_VERSION,
    NAME_PATTERN,
    Amount,
    Count,
    DecimalString,
    Digest,
    DnsLabel,
    ExitStatus,
    JobName,
    Model,
    PositiveCount,
    Sentence,
    ShortText,
    SignedDecimalString,
    SourceUri,
    StoreUri,
    Time,
)
from orchestrator.api.notification import WEBHOOKS_HAVE_NAMES, NotificationsStatus, Webhooks, names_are_unique
from orchestrator.api.plan import Estimate, MemoryPlan
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import PrepareResult, ProgressReport, StartingAdapter
from orchestrator.api.stage_name import StageKind, stage_name

SEPARATORS_OF_MLFLOW = frozenset("/:?")
CANCEL_ANNOTATION = "qlora.dev/cancel"
PROMOTE_ANNOTATION = "qlora.dev/promote"
"""`true`, or `forced: ` and a person's reason: spec.tracking.promote's alias is to move to the job's version."""
FORCED = "forced: "
REQUEST_ANNOTATIONS = (CANCEL_ANNOTATION, PROMOTE_ANNOTATION)
"""What people ask of a job that is stored already; a manifest of a new one asks for nothing."""
RELEASE_FINALIZER = "qlora.dev/release"
"""The finalizer of a job for which something outside has to be settled before its object may go."""
NOTIFY_FINALIZER = "qlora.dev/notify"
"""The finalizer of a job whose webhooks are still to be told something, its end at the latest."""
# What the results depend on; a job that should compute something else is another job.
IMMUTABLE_SPEC_FIELDS = (
    "model",
    "dataset",
    "adapter",
    "training",
    "store",
    "evaluation.metric",
    "evaluation.mode",
    "evaluation.keepBest",
    "evaluation.generation",
    "tracking",
    "publish",
)
TRAINING_FIELDS_ABOVE_ZERO = (
    "epochs",
    "learning_rate",
    "max_grad_norm",
    "spike_ratio",
    "adam_epsilon",
    "lora_plus_ratio",
)
TRAINING_FIELDS_BELOW_ONE = ("warmup_ratio", "adam_beta1", "adam_beta2")
MIN_PRIORITY, MAX_PRIORITY = -1_000_000, 1_000_000
MAX_EVICTIONS = 64
"""Of an eviction budget: so many are remembered, so that each budget can be kept to the letter."""
MAX_LABELS = 1024
MAX_ANNOTATIONS_BYTES = 1 << 18
"""Of keys and values together: the API server's bound."""
_NAME = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
_PREFIX = r"([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)"
QualifiedName = Annotated[str, StringConstraints(pattern=f"^{_PREFIX}?{_NAME}$", max_length=317)]
"""A key of a label or an annotation, as the API server takes it: an optional DNS name, a slash, a name."""
LabelValue = Annotated[str, StringConstraints(pattern=f"^{_NAME}?$", max_length=63)]
Labels = Annotated[dict[QualifiedName, LabelValue], Field(max_length=MAX_LABELS)]
Annotations = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=f"^(?i){_PREFIX}?{_NAME}$", max_length=317)],
        Annotated[str, StringConstraints(max_length=MAX_ANNOTATIONS_BYTES)],
    ],
    Field(max_length=MAX_LABELS),
]
MAX_CHAT_TEMPLATE_BYTES = 48 << 10
"""A stage's task is one variable of its environment, of which Linux takes 128 KiB; there a quote takes two bytes."""
CHAT_TEMPLATE_NAMES = ("chatml", "gemma", "llama3", "phi3")
CHAT_TEMPLATE_RULE = f"Jinja text, which has {{{{ or {{% in it, or one of {', '.join(CHAT_TEMPLATE_NAMES)}"
CHAT_TEMPLATE_PATTERN = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
"""Text: control characters but for tabs and line ends take six bytes each in the task."""
ASKING_HOLDS_OUT = (
    "evaluation.generation and samples ask held-out records: set dataset.evalSource or dataset.evalFraction"
)
ASKING_KNOWS_ANSWERS = (
    "evaluation.generation and samples have to know where an answer begins: dataset.trainOn must not be all, nor "
    "dataset.format text"
)
HeldOutMetric = Literal[
    "loss",
    "perplexity",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
]
_OF_PAIRS: tuple[HeldOutMetric, ...] = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
HELD_OUT_METRICS: Mapping[Literal["sft", "dpo", "orpo"], tuple[HeldOutMetric, ...]] = {
    "sft": ("loss", "perplexity"),
    "dpo": _OF_PAIRS,
    "orpo": (*_OF_PAIRS, "nll_loss", "log_odds_ratio", "log_odds_chosen"),
}
"""What an evaluation shows of each objective, behind `eval/`."""
LOWER_IS_BETTER: frozenset[HeldOutMetric] = frozenset(
    {"loss", "perplexity", "nll_loss", "rewards/rejected", "logps/rejected"}
)
METRIC_IS_SHOWN = "evaluation.metric must be one that evaluations of this objective show: " + "; ".join(
    f"of {objective} {', '.join(metrics)}" for objective, metrics in HELD_OUT_METRICS.items()
)
METRIC_HOLDS_OUT = (
    "evaluation.metric is of held-out records: set dataset.evalSource or dataset.evalFraction, or leave metric out"
)
ROLLBACK_RULE = (
    "training.onNonFinite and onSpike rollback go back to a checkpoint whose step does not depend on the clock: set "
    "checkpoint.everySteps"
)
GATE_IS_COMPUTED = "tracking.promote.when must name metrics of evaluation.generation.metrics"
MAX_EPOCHS = 1_000_000
OBJECTIVE_RULE = (
    "training.objective.type dpo or orpo and dataset.format preference go together: set both, or neither (sft "
    "takes the others)"
)
WHOLE_ANSWERS_RULE = (
    "dataset.tooLong must be fail or drop for preferences: an answer that is cut is not the one that was judged"
)
ANSWERS_ALONE_RULE = "dataset.trainOn must not be all for preferences: their answers alone are compared"
EXPERTS_ARE_NOT_MERGED = (
    "publish.formats: what an adapter on routed experts is in other formats is not settled; leave out adapter.experts, "
    "or publish.formats"
)
DORA_IS_NO_GGUF_ADAPTER = (
    "publish.formats: llama.cpp has no DoRA in adapters; take merged or gguf-q8_0 instead of gguf-adapter"
)
ONE_ANSWER_RULE = (
    "evaluation.generation and samples hold answers against the one that a record has: leave them out for preferences"
)
MAX_PARALLELISM = 64
Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=255)]
PublishFormat = Literal["merged", "gguf-f16", "gguf-q8_0", "gguf-adapter"]
WHOLE_MODEL_FORMATS: frozenset[PublishFormat] = frozenset({"merged", "gguf-f16", "gguf-q8_0"})
AnswerMetric = Literal["exactMatch", "f1", "chrf", "bleu", "jsonValidity", "regex"]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=128)]
VramQuantity = Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,3}(\.[0-9]{1,3})?Gi)$", max_length=12)]
GPU_CLASS_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$"
GpuClassName = Annotated[str, StringConstraints(pattern=GPU_CLASS_PATTERN, max_length=32)]


class OwnerReference(Model):
    """The sweep that a trial belongs to: with that it is deleted, as Kubernetes' garbage collector does."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRASweep"] = "QLoRASweep"
    name: DnsLabel
    uid: ShortText
    controller: bool = True
    block_owner_deletion: bool = False


class ObjectMeta(Model):
    """The part of Kubernetes object metadata that the service reads; the store fills what it owns."""

    name: JobName
    namespace: DnsLabel = "default"
    uid: ShortText = ""
    resource_version: ShortText = ""
    generation: Count = 1
    creation_timestamp: Time | None = None
    deletion_timestamp: Time | None = None
    labels: Labels = {}
    annotations: Annotations = {}
    finalizers: Annotated[tuple[Annotated[str, StringConstraints(max_length=317)], ...], Field(max_length=1024)] = ()
    owner_references: Annotated[tuple[OwnerReference, ...], Field(max_length=1)] = ()
    """The sweep of a trial. Owners of other kinds are nothing to the service."""

    @field_validator("annotations")
    @classmethod
    def _annotations_fit(cls, value: dict[str, str]) -> dict[str, str]:
        size = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
        if size > MAX_ANNOTATIONS_BYTES:
            raise ValueError(f"annotations must have at most {MAX_ANNOTATIONS_BYTES} bytes together")
        return value


class ModelSource(Model):
    """The base model. Only safetensors are read; remote code is never run."""

    source: SourceUri
    """`hf://owner/name`, `pvc://claim/path`, `s3://bucket/prefix` or `file:///path` of a Hugging Face model folder."""
    revision: Revision = "main"
    """Branch, tag or commit of a hub model; recorded as the commit it named at prepare time."""
    chat_template: (
        Annotated[
            str, StringConstraints(pattern=CHAT_TEMPLATE_PATTERN, min_length=1, max_length=MAX_CHAT_TEMPLATE_BYTES)
        ]
        | None
    ) = None
    """For models that ship none: a Jinja chat template, or the name of one: chatml, gemma, llama3, phi3."""

    @field_validator("chat_template")
    @classmethod
    def _chat_template_fits(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) > MAX_CHAT_TEMPLATE_BYTES:
            raise ValueError(f"chatTemplate must have at most {MAX_CHAT_TEMPLATE_BYTES} bytes")
        return value


class DatasetSource(Model):
    """The training data and how it becomes tokens."""

    source: SourceUri
    """A .jsonl, .json, .parquet or .csv file (optionally .gz), or `hf://owner/name` for a datasets id."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"] = "messages"
    train_on: Literal["assistant", "completion", "all"] = "assistant"
    """Which tokens carry loss: every assistant turn, only the last one, or all tokens; of preferences, the answers."""
    eval_source: SourceUri | None = None
    """Held-out data of the same format; excludes evalFraction."""
    eval_fraction: DecimalString = "0"
    """Share of the records held out for evaluation, chosen by seed, at least one where it is above 0."""
    too_long: Literal["fail", "truncate", "drop"] = "fail"
    """What happens to a record longer than training.sequenceLength; the number concerned is reported."""
    split: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)] = "train"
    """The split of a datasets id."""
    eval_split: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)] | None = None
    """The split of evalSource where that is a datasets id; default: split."""
    config: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    """The configuration of a datasets id that has several, of evalSource too."""

    @property
    def holds_out(self) -> bool:
        """Whether some records are for evaluation alone."""
        return self.eval_source is not None or float(self.eval_fraction) > 0

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DatasetSource:
        if float(self.eval_fraction) > 0.5:
            raise ValueError("evalFraction must be between 0 and 0.5")
        if self.eval_source is not None and float(self.eval_fraction) != 0:
            raise ValueError("set evalSource or evalFraction, not both")
        if self.eval_split is not None and self.eval_source is None:
            raise ValueError("evalSplit is a split of evalSource: set both")
        return self


class ObjectiveSpec(Model):
    """What training minimises; the defaults are TRL's."""

    type: Literal["sft", "dpo", "orpo"] = "sft"
    """`sft` is the cross-entropy of what carries loss; `dpo` prefers chosen to rejected answers (Rafailov et al., 2023)
    and takes records of the format preference; `orpo` takes them too, and teaches the chosen ones beside (Hong et al.,
    2024)."""
    beta: DecimalString = "0.1"
    """Of dpo: how much it costs to move away from the model that training begins with. Of orpo: what preferring weighs
    beside teaching."""
    label_smoothing: DecimalString = "0"
    """Of dpo: the share of the preferences that is held to be the wrong way round (Mitchell, 2023)."""

    @model_validator(mode="after")
    def _ranges(self) -> ObjectiveSpec:
        if float(self.beta) <= 0:
            raise ValueError("beta must be above 0")
        if float(self.label_smoothing) >= 0.5:
            raise ValueError("labelSmoothing must be below 0.5")
        if self.type == "sft" and float(self.beta) != 0.1:
            raise ValueError("beta is of preferences: set type to dpo or orpo, or leave beta out")
        if self.type != "dpo" and float(self.label_smoothing) != 0:
            raise ValueError("labelSmoothing is of dpo: set type to dpo, or leave labelSmoothing out")
        return self


class TrainingSpec(Model):
    """Hyperparameters. The global batch is fixed here; how it is split over micro-batches is the plan's business."""

    objective: ObjectiveSpec = ObjectiveSpec()
    epochs: DecimalString = "3"
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000)
    """Optimizer steps; overrides epochs."""
    sequence_length: int = Field(default=2048, ge=16, le=1_048_576)
    packing: bool = True
    """Fill sequences with several records; attention and positions never cross a record boundary. Both answers of a
    preference are in one sequence, each a record with its prompt."""
    global_batch_size: int = Field(default=16, ge=1, le=65536)
    """Sequences in one optimizer step."""
    learning_rate: DecimalString = "2e-4"
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: DecimalString = "0.03"
    weight_decay: DecimalString = "0"
    max_grad_norm: DecimalString = "0.3"
    on_non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What follows a loss or a gradient norm that is no finite number: `stop` fails the job and names the records,
    `skip` leaves that step's update out and goes on with the next rows, `rollback` also takes adapter and optimizer
    back to the last checkpoint of checkpoint.everySteps."""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same of a gradient norm that is more than spikeRatio times the median of the last 64 steps', from step 17
    on."""
    spike_ratio: DecimalString = "10"
    max_skips: int = Field(default=10, ge=0, le=100_000)
    """Updates that the job leaves out by `skip` at most; one more ends it."""
    max_rollbacks: int = Field(default=3, ge=0, le=1000)
    """How often it goes back by `rollback` at most; once more ends it."""
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_32bit"] = "paged_adamw_32bit"
    adam_beta1: DecimalString = "0.9"
    adam_beta2: DecimalString = "0.999"
    adam_epsilon: DecimalString = "1e-8"
    lora_plus_ratio: DecimalString = "1"
    """Learning rate of B over that of A (LoRA+, Hayou et al., 2024); 1 is plain LoRA."""
    neftune_alpha: DecimalString = "0"
    """Noise on the embeddings while training (NEFTune, Jain et al., 2023); 0 is none."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    deterministic: bool = True
    """Bit-exact resume on the same kind of card."""

    @property
    def rolls_back(self) -> bool:
        """Whether something takes training back to a checkpoint."""
        return "rollback" in (self.on_non_finite, self.on_spike)

    @model_validator(mode="after")
    def _ranges(self) -> TrainingSpec:
        for name in TRAINING_FIELDS_ABOVE_ZERO:
            if float(getattr(self, name)) <= 0:
                raise ValueError(f"{to_camel(name)} must be above 0")
        for name in TRAINING_FIELDS_BELOW_ONE:
            if float(getattr(self, name)) >= 1:
                raise ValueError(f"{to_camel(name)} must be below 1")
        if float(self.epochs) > MAX_EPOCHS:
            raise ValueError(f"epochs must be at most {MAX_EPOCHS}")
        return self


class PrepareSpec(Model):
    """How the data are prepared. Nothing here changes what they become."""

    parallelism: int = Field(default=1, ge=1, le=MAX_PARALLELISM)
    """Ray workers that encode records, each on a CPU; more than 1 is worth it from millions of tokens on."""


class ResourcesSpec(Model):
    """What the train stage may run on."""

    vram: VramQuantity = "auto"
    """`auto` sizes the job; a quantity such as `48Gi` asks for a card sold as at least that."""
    gpu_classes: Annotated[tuple[GpuClassName, ...], Field(max_length=16)] = ()
    """Only these classes, in order of preference; empty means any."""
    spot: Literal["allowed", "forbidden", "required"] = "allowed"
    class_change: Literal["auto", "allowed", "forbidden"] = "auto"
    """Whether the job may go on from its checkpoint on another class than the one it began on, sized anew, while all
    GPUs of that one are in use. It is then not bit for bit what it would have been; `auto` forbids it to jobs that
    training.deterministic promises that, and allows it to others."""


class CheckpointSpec(Model):
    """How often training state becomes durable, and how much of it is kept."""

    every_seconds: int = Field(default=600, ge=1, le=86_400)
    every_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    """Also after so many steps."""
    keep: int = Field(default=2, ge=1, le=100)


class GenerationSpec(Model):
    """Answers to held-out prompts after the last step: of the adapter, of the base, and of whom it is to replace."""

    prompts: int = Field(default=64, ge=1, le=512)
    """Held-out records that are asked, at most, chosen by training.seed; the last answer of each is the reference."""
    max_new_tokens: int = Field(default=128, ge=1, le=4096)
    """Of an answer; prompt and answer together have at most training.sequenceLength, and at most 4,096."""
    metrics: Annotated[tuple[AnswerMetric, ...], Field(min_length=1, max_length=6)] = ("exactMatch", "f1")
    """What answers are scored by; chrf and bleu go to 100, the others to 1."""
    regex: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    """What the metric regex looks for, anywhere in an answer; without look-around and back-references."""

    @model_validator(mode="after")
    def _metrics_are_told(self) -> GenerationSpec:
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must name each metric once")
        if (self.regex is not None) != ("regex" in self.metrics):
            raise ValueError("regex is the pattern of the metric regex: set both or none")
        return self


class SamplesSpec(Model):
    """Answers to a few held-out prompts at evaluations, to be looked at: how they become what they are."""

    prompts: int = Field(default=3, ge=1, le=8)
    """Held-out records that are asked, at most, chosen by training.seed."""
    max_new_tokens: int = Field(default=48, ge=1, le=256)
    """Of an answer, at most; each token takes a forward pass over all prompts."""


class EvaluationSpec(Model):
    """Held-out evaluation; runs only where the dataset holds something out, and always once at the end."""

    every_steps: int = Field(default=100, ge=1, le=1_000_000)
    metric: HeldOutMetric = "loss"
    """What early stopping and keepBest go by, as evaluations show it behind `eval/`: perplexity is of sft, rewards and
    logps are of dpo and orpo, the rest of orpo."""
    mode: Literal["min", "max"] | None = None
    """Whether a lower or a higher metric is better. Default: min of losses, perplexity and what is
    rejected, max of the others."""
    early_stopping_patience: int = Field(default=0, ge=0, le=1000)
    """Stop after so many evaluations in a row without a better metric; 0 never stops early."""
    early_stopping_min_delta: DecimalString = "0"
    """For early stopping, only what is better than the best before by more than this is better."""
    keep_best: bool = False
    """End with the adapter of the best evaluation instead of the last step's."""
    generation: GenerationSpec | None = None
    """Also answer held-out prompts when training is over; costs the GPU the time that the estimate tells."""
    samples: SamplesSpec | None = None
    """Also answer a few of them at the evaluations before that, at 64 of them at most."""

    @property
    def lower_is_better(self) -> bool:
        """Of the metric that decides."""
        return self.metric in LOWER_IS_BETTER if self.mode is None else self.mode == "min"

    @property
    def compares(self) -> bool:
        """Whether something follows from which evaluation was the best."""
        return self.keep_best or self.early_stopping_patience > 0


class GateRule(Model):
    """What a metric of answers to held-out prompts must reach."""

    metric: AnswerMetric
    """One of evaluation.generation.metrics."""
    over: Literal["base", "holder"] | None = None
    """By how much the adapter must be better: than the base, or than the version that has the alias, where one has it.
    Absent: the adapter's own score counts."""
    at_least: SignedDecimalString
    """In the metric's own units; below 0 it says how much worse the adapter may be."""
    confidence: DecimalString | None = None
    """The lower end of the interval with this confidence must reach it. Absent: the figure itself."""

    @field_validator("confidence")
    @classmethod
    def _confidence_is_one(cls, value: DecimalString | None) -> DecimalString | None:
        if value is not None and not 0.5 <= float(value) < 1:
            raise ValueError("confidence must be at least 0.5 and below 1")
        return value


class PromoteSpec(Model):
    """An alias that moves to the new version only when it is good enough."""

    alias: Alias
    """Such as `champion`; MLflow reserves `latest` and `v<number>`."""
    when: Annotated[tuple[GateRule, ...], Field(min_length=1, max_length=8)]
    """All of these must hold."""
    approval: Literal["automatic", "manual"] = "automatic"
    """Whether the alias then moves by itself, or once somebody says so: `qlora promote NAME`."""

    @property
    def depends_on_holder(self) -> bool:
        """Whether it matters who has the alias."""
        return any(rule.over == "holder" for rule in self.when)

    @field_validator("alias")
    @classmethod
    def _alias_is_free(cls, value: str) -> str:
        if is_reserved(value):
            raise ValueError("promote must not move `latest` or `v<number>`, which MLflow reserves")
        return value


def is_reserved(alias: str) -> bool:
    """Whether MLflow keeps the alias for itself."""
    return alias.lower() == "latest" or (alias[0] in "vV" and alias[1:].isdigit())


class TrackingSpec(Model):
    """Where metrics and the adapter go in MLflow."""

    experiment: Annotated[str, StringConstraints(pattern=NAME_PATTERN, min_length=1, max_length=256)] | None = None
    """Default: the job's namespace, to which it belongs: one of another namespace is refused."""
    registered_model: Annotated[str, StringConstraints(pattern=NAME_PATTERN, min_length=1, max_length=256)] | None = (
        None
    )
    """Default: `<namespace>-<job>`. It belongs to the job's namespace: one of another is refused."""
    alias: Alias | None = "candidate"
    """Moved to the new version; MLflow reserves `latest` and `v<number>`."""
    promote: PromoteSpec | None = None
    """Another alias, which moves only when answers to held-out prompts are good enough."""

    @model_serializer(mode="wrap")
    def _keep_null(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Null is a choice here, because the default is another: it must not be dropped with the unset fields."""
        wire: dict[str, object] = dump(self)
        return wire if self.alias is not None else {**wire, "alias": None}

    @field_validator("registered_model")
    @classmethod
    def _registered_model_has_an_address(cls, value: str | None) -> str | None:
        if value is not None and not SEPARATORS_OF_MLFLOW.isdisjoint(value):
            raise ValueError("registeredModel must hold none of / : ?, at which MLflow takes addresses apart")
        if value in (".", ".."):
            raise ValueError("registeredModel must not be `.` or `..`, which vanish from URLs")
        return value

    @field_validator("alias")
    @classmethod
    def _alias_is_free(cls, value: str | None) -> str | None:
        if value is not None and is_reserved(value):
            raise ValueError("alias must not be `latest` or `v<number>`, which MLflow reserves")
        return value

    @model_validator(mode="after")
    def _promotes_another(self) -> TrackingSpec:
        if self.promote is not None and self.promote.alias == self.alias:
            raise ValueError("promote.alias must be another than alias, which moves to every version")
        return self

    @property
    def compared_alias(self) -> str | None:
        """Whose holder a new adapter is compared with."""
        return self.promote.alias if self.promote is not None else self.alias


class PublishSpec(Model):
    """What the job makes of its adapter beside the adapter itself, which is always published."""

    formats: Annotated[tuple[PublishFormat, ...], Field(max_length=4)] = ()
    """`merged`: the base's 16-bit weights with the adapter added to them, as safetensors; `gguf-f16` and `gguf-q8_0`:
    the same as a GGUF file; `gguf-adapter`: the adapter alone as GGUF."""

    @field_validator("formats")
    @classmethod
    def _formats_differ(cls, value: tuple[PublishFormat, ...]) -> tuple[PublishFormat, ...]:
        if len(set(value)) != len(value):
            raise ValueError("formats must name each format once")
        return value


class StoreSpec(Model):
    """Where prepared data, checkpoints and the adapter are kept."""

    uri: StoreUri


class EvictionBudget(Model):
    """How often the job may be moved for others' sake: preempted, reclaimed, at the end of its turn. What becomes of
    nodes, a drained queue and the job's own failures are counted by nothing."""

    max_evictions: int = Field(ge=1, le=MAX_EVICTIONS)
    """Once it has been moved so often, it is not chosen again before it has run for as long as the service protects
    it."""
    window_seconds: int | None = Field(default=None, ge=3_600, le=31_536_000)
    """Only evictions within so long count; absent: all that there were."""


class QLoRAJobSpec(Model):
    """What the user asks for."""

    model: ModelSource
    dataset: DatasetSource
    adapter: AdapterSpec = AdapterSpec()
    training: TrainingSpec = TrainingSpec()
    prepare: PrepareSpec = PrepareSpec()
    resources: ResourcesSpec = ResourcesSpec()
    queue: DnsLabel = "default"
    priority: int = Field(default=0, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Higher goes first and may preempt lower."""
    eviction_budget: EvictionBudget | None = None
    """Default: the service's."""
    store: StoreSpec | None = None
    """Default: the service's own store."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    tracking: TrackingSpec = TrackingSpec()
    publish: PublishSpec = PublishSpec()
    backoff_limit: int = Field(default=3, ge=0, le=100)
    """Failed attempts for one cause that are tried again before a new checkpoint; what is not the job's own fault, such
    as preemptions and outages, does not count."""
    outage_limit_seconds: int | None = Field(default=None, ge=1, le=31_536_000)
    """How long the surroundings (store, registry, nodes) may keep the job from progress before it fails; waiting for a
    GPU does not count. Default: the service's."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=31_536_000)
    """Bound on the seconds spent in stages, summed over attempts."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=31_536_000)
    """Delete the job object so long after it finished; MLflow and the store keep the results."""
    suspend: bool = False
    """Hold the job: a running stage checkpoints and stops, and nothing starts until this is false again."""
    notifications: Webhooks = ()
    """Who is told what becomes of the job."""

    @model_validator(mode="after")
    def _webhooks_have_names(self) -> QLoRAJobSpec:
        if not names_are_unique(self.notifications):
            raise ValueError(WEBHOOKS_HAVE_NAMES)
        return self

    def settled(self, start: StartingAdapter | None) -> QLoRAJobSpec:
        """With what is taken over from the adapter that training begins with, where there is one and it is known."""
        if start is None:
            return self
        taken = {name: getattr(start, name) for name in TAKEN_OVER}
        return self.model_copy(update={"adapter": self.adapter.model_copy(update=taken)})

    @model_validator(mode="after")
    def _prompts_can_be_asked(self) -> QLoRAJobSpec:
        if self.evaluation.generation is None and self.evaluation.samples is None:
            return self
        if not self.dataset.holds_out:
            raise ValueError(ASKING_HOLDS_OUT)
        if self.dataset.train_on == "all" or self.dataset.format == "text":
            raise ValueError(ASKING_KNOWS_ANSWERS)
        return self

    @model_validator(mode="after")
    def _there_is_a_way_back(self) -> QLoRAJobSpec:
        if self.training.rolls_back and self.checkpoint.every_steps is None:
            raise ValueError(ROLLBACK_RULE)
        return self

    @model_validator(mode="after")
    def _metric_is_shown(self) -> QLoRAJobSpec:
        if self.evaluation.metric not in HELD_OUT_METRICS[self.training.objective.type]:
            raise ValueError(METRIC_IS_SHOWN)
        if self.evaluation.metric != "loss" and not self.dataset.holds_out:
            raise ValueError(METRIC_HOLDS_OUT)
        return self

    @model_validator(mode="after")
    def _data_fit_the_objective(self) -> QLoRAJobSpec:
        pairs = self.dataset.format == "preference"
        if (self.training.objective.type != "sft") != pairs:
            raise ValueError(OBJECTIVE_RULE)
        if pairs and self.dataset.too_long == "truncate":
            raise ValueError(WHOLE_ANSWERS_RULE)
        if pairs and self.dataset.train_on == "all":
            raise ValueError(ANSWERS_ALONE_RULE)
        if pairs and (self.evaluation.generation is not None or self.evaluation.samples is not None):
            raise ValueError(ONE_ANSWER_RULE)
        return self

    @model_validator(mode="after")
    def _formats_take_the_adapter(self) -> QLoRAJobSpec:
        if self.adapter.experts and self.publish.formats:
            raise ValueError(EXPERTS_ARE_NOT_MERGED)
        if self.adapter.use_dora and "gguf-adapter" in self.publish.formats:
            raise ValueError(DORA_IS_NO_GGUF_ADAPTER)
        return self

    @model_validator(mode="after")
    def _gate_is_computed(self) -> QLoRAJobSpec:
        promote, generation = self.tracking.promote, self.evaluation.generation
        computed = generation.metrics if generation is not None else ()
        if promote is not None and not all(rule.metric in computed for rule in promote.when):
            raise ValueError(GATE_IS_COMPUTED)
        return self


class Condition(Model):
    """A Kubernetes condition."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: Sentence = ""
    last_transition_time: Time
    observed_generation: Count = 0


class Attempt(Model):
    """One run of one stage. Recorded before anything is created, so that nothing created is ever forgotten."""

    stage: StageKind
    number: PositiveCount
    """Counts over all stages of the job, from 1: the fencing token."""
    queue: DnsLabel | None = None
    """Of train: whose GPU it was given, and on whose account it is, though the job may be moved meanwhile."""
    gpu_class: ShortText | None = None
    plan: MemoryPlan | None = None
    created_time: Time
    start_time: Time | None = None
    """When the stage was first seen running."""
    stop_time: Time | None = None
    """When it was asked to stop."""
    stop_reason: Reason | None = None
    moves_to: ShortText | None = None
    """Of a job that makes room on a large card: the class of the free GPU that is kept for it while it stops."""
    finish_time: Time | None = None
    exit_code: ExitStatus | None = None
    reason: Reason | None = None
    message: Sentence = ""
    node: ShortText | None = None
    """Where its stage ran, as far as it is known."""
    avoid_nodes: Annotated[tuple[ShortText, ...], Field(max_length=8)] = ()
    """Machines that it is not put on, because a card broke there lately."""
    seen_time: Time | None = None
    """When its stage was first seen to exist; from then on, a stage that is missing has ended."""
    stage_uid: ShortText | None = None
    """The uid of its stage's pod, which no user can choose: from then on, what any other pod of the name says is not
    believed."""
    progress_time: Time | None = None
    """When its last step was seen, by the controller's clock."""
    predicted_bytes: Count | None = None
    """Of train: the allocator's peak that was expected, without the margin."""
    measured_bytes: Count | None = None
    """Of train: the allocator's peak, where the stage could tell it."""
    versions: ShortText | None = None
    """Of train: the libraries that the peak depends on."""

    @property
    def active(self) -> bool:
        """Whether the stage may still exist outside."""
        return self.finish_time is None


class CheckpointStatus(Model):
    """The last durable checkpoint."""

    step: Count
    uri: Annotated[str, StringConstraints(max_length=2048)]
    time: Time
    attempt: PositiveCount | None = None
    """The attempt that reported it first."""


class ClassChange(Model):
    """A checkpoint from which the job went on on another class: from that step on, its bits are another card's."""

    step: Count
    from_class: ShortText
    to_class: ShortText


class EvictionBudgetStatus(Model):
    """What of the eviction budget is spent."""

    times: Annotated[tuple[Time, ...], Field(max_length=MAX_EVICTIONS)] = ()
    """When the job was asked to make way for others, the latest of these, oldest first, by the controller's clock."""
    left: Count | None = None
    """Evictions before it is protected; absent where it has no budget."""
    renew_time: Time | None = None
    """When the next one of them counts no more; absent where none ever does, or there is no budget."""


class Setback(Model):
    """A cause that has ended attempts since the last durable progress."""

    reason: Reason
    count: PositiveCount
    """Attempts that it has ended."""
    seconds: Amount = 0
    """Spent on trying again and on the pauses between; not counted while an outage hits other jobs, too."""


class MlflowStatus(Model):
    """Where the job's results are in MLflow."""

    run_id: ShortText | None = None
    experiment_id: ShortText | None = None
    registered_model: ShortText | None = None
    model_version: ShortText | None = None
    run_status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] | None = None
    """The last status that the controller gave the run."""


class QLoRAJobStatus(Model):
    """What came of the job. Written by the controller alone; there is no phase: conditions tell."""

    observed_generation: Count = 0
    summary: Sentence = ""
    """One line for people: what is going on and what it waits for."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
    prepared: PrepareResult | None = None
    starting_job: StartingJob | None = None
    """The job that `adapter.from` names, from the first prepare attempt on."""
    estimate: Estimate | None = None
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=64)] = ()
    """The most recent attempts, oldest first; older ones are folded into the counters below."""
    attempts_total: Count = 0
    failures_total: Count = 0
    """Failed attempts that counted against spec.backoffLimit, over the job's whole life."""
    setbacks: Annotated[tuple[Setback, ...], Field(max_length=32)] = ()
    """What went wrong since the last durable progress, by cause; a new checkpoint forgets it."""
    host_memory_escalations: Count = 0
    """How often the stages' host memory was raised after it had run out."""
    active_seconds: Amount = 0
    """Seconds spent in finished attempts."""
    gpu_seconds: Amount = 0
    """GPU seconds spent in finished train attempts."""
    retry_after: Time | None = None
    """No new attempt before this time."""
    step_ups: Count = 0
    """How often the job moved to a fallback plan or a larger class after running out of memory."""
    progress: ProgressReport | None = None
    checkpoint: CheckpointStatus | None = None
    class_changes: Annotated[tuple[ClassChange, ...], Field(max_length=16)] = ()
    """The latest of them, oldest first; where there is none, all steps were made on one class."""
    store_uri: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """The job's own folder in its store: checkpoints, the adapter, and the log of every attempt."""
    adapter_uri: Annotated[str, StringConstraints(max_length=2048)] | None = None
    adapter_digest: Digest | None = None
    mlflow: MlflowStatus = MlflowStatus()
    evictions: Annotated[dict[ShortText, Count], Field(max_length=16)] = {}
    """Evictions by reason."""
    eviction_budget: EvictionBudgetStatus | None = None
    """Absent until the job was moved for others' sake: all of its budget is left then."""
    finish_time: Time | None = None
    release_since: Time | None = None
    """Since when the deleted job waits for MLflow to take the end of its run, and for webhooks to take what is told, by
    the controller's clock."""
    notifications: NotificationsStatus | None = None
    """Absent where nobody is told anything of the job."""

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of this type, if it has been set."""
        for known in self.conditions:  # a loop: thousands of waiting jobs are asked in one decision
            if known.type is kind:
                return known
        return None

    @property
    def start(self) -> StartingAdapter | None:
        """The adapter that training begins with, once prepare has read it."""
        return self.prepared.start if self.prepared is not None else None

    def is_true(self, kind: ConditionType) -> bool:
        """Whether the condition has been set and is True."""
        found = self.condition(kind)
        return found is not None and found.status == "True"

    @property
    def active_attempt(self) -> Attempt | None:
        """The attempt whose stage may exist outside; there is at most one."""
        attempts = self.attempts
        return attempts[-1] if attempts and attempts[-1].finish_time is None else None


class QLoRAJob(Model):
    """A fine-tuning job."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAJob"] = "QLoRAJob"
    metadata: ObjectMeta
    spec: QLoRAJobSpec
    status: QLoRAJobStatus = QLoRAJobStatus()

    @field_validator("spec")
    @classmethod
    def _chat_template_is_one(cls, spec: QLoRAJobSpec) -> QLoRAJobSpec:
        """At submission, where a file's name is told from a template; a stage looks at what the template writes."""
        template = spec.model.chat_template
        if template is not None and not ("{{" in template or "{%" in template or template in CHAT_TEMPLATE_NAMES):
            raise ValueError(f"model.chatTemplate must be {CHAT_TEMPLATE_RULE}")
        return spec

    @property
    def settled_spec(self) -> QLoRAJobSpec:
        """The spec as the job is sized and trained: with what prepare took over from `adapter.from`."""
        return self.spec.settled(self.status.start)

    @property
    def key(self) -> str:
        """`namespace/name`, how the store and the controller address a job."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def sweep(self) -> OwnerReference | None:
        """The sweep that the job is a trial of."""
        return self.metadata.owner_references[0] if self.metadata.owner_references else None

    @property
    def cancelled(self) -> bool:
        """Whether the user has asked to cancel: by annotation, or by deleting the object."""
        asked = self.metadata.annotations.get(CANCEL_ANNOTATION) == "true"
        return asked or self.metadata.deletion_timestamp is not None

    def stage_name(self, attempt: Attempt) -> str:
        """The deterministic name of an attempt's stage: `<job>-<stage>-<attempt>`."""
        return stage_name(self.metadata.name, attempt.stage, attempt.number)


def new_uid() -> str:
    """A uid for stores that have no API server to give one."""
    return str(uuid4())
