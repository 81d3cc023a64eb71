"""The CustomResourceDefinitions, built from the contract's models; `python -m docs.generate` writes them as YAML.

The models are the source of names, bounds, defaults and descriptions. What a schema cannot say, a model says in a
validator and RULES says again in CEL, under the validator's name: a validator without rules is an error here. Rules:

- Schemas are structural. A keyword that this module does not know is an error, so no bound is lost on the way.
- The spec has the models' defaults, which the API server applies; the status is as the controller wrote it.
- Null means unset, and the API server drops it; where it is a choice, because the default is another, it is kept.
- CEL reads decimals as doubles, as the validators do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic.alias_generators import to_camel

from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.base import API_VERSION, DECIMAL_PATTERN, Model
from orchestrator.api.job import (
    ANSWERS_ALONE_RULE,
    ASKING_HOLDS_OUT,
    ASKING_KNOWS_ANSWERS,
    CHAT_TEMPLATE_NAMES,
    CHAT_TEMPLATE_RULE,
    DORA_IS_NO_GGUF_ADAPTER,
    EXPERTS_ARE_NOT_MERGED,
    GATE_IS_COMPUTED,
    HELD_OUT_METRICS,
    IMMUTABLE_SPEC_FIELDS,
    MAX_CHAT_TEMPLATE_BYTES,
    MAX_EPOCHS,
    METRIC_HOLDS_OUT,
    METRIC_IS_SHOWN,
    OBJECTIVE_RULE,
    ONE_ANSWER_RULE,
    ROLLBACK_RULE,
    TRAINING_FIELDS_ABOVE_ZERO,
    TRAINING_FIELDS_BELOW_ONE,
    WHOLE_ANSWERS_RULE,
    DatasetSource,
    GateRule,
    GenerationSpec,
    ModelSource,
    ObjectiveSpec,
    ObjectMeta,
    PromoteSpec,
    PublishSpec,
    QLoRAJob,
    QLoRAJobSpec,
    TrackingSpec,
    TrainingSpec,
)
from orchestrator.api.layer_trace import KIND_LETTERS, ModelTrace
from orchestrator.api.notification import WEBHOOKS_HAVE_NAMES
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import Budget, QLoRAQueue, QLoRAQueueSpec
from orchestrator.api.sweep import (
    CHOICE_RULE,
    CHOICES_DIFFER_RULE,
    DECIMAL_FIELDS,
    DECIMAL_RULE,
    FIELDS_DIFFER_RULE,
    GATE_RULE,
    INTEGER_FIELDS,
    INTEGER_PATTERN,
    INTEGER_RULE,
    LOG_RULE,
    METRIC_RULE,
    ONE_WAY_RULE,
    ORDER_RULE,
    RUNGS_RULE,
    SWEEP_IMMUTABLE_FIELDS,
    DecimalRange,
    IntegerRange,
    LogRange,
    QLoRASweep,
    QLoRASweepSpec,
    SweepDimension,
)

Json = dict[str, Any]  # Any: schemas and manifests, as they come

CATEGORY = "qlora"
LIST_MAP_KEYS: Mapping[tuple[str, str], str] = {("QLoRAJobStatus", "conditions"): "type"}
"""Lists that server-side apply merges by a key, by model and field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One CEL rule of an object; `self` is the object."""

    rule: str
    message: str
    field: str = ""
    """Wire name of the field that the message is about."""

    def to_wire(self) -> Json:
        """The entry of `x-kubernetes-validations`."""
        path = {"fieldPath": f".{self.field}"} if self.field else {}
        return {"rule": self.rule, "message": self.message, **path}


def _compared(names: tuple[str, ...], comparison: str, message: str) -> tuple[Rule, ...]:
    """The same comparison of several decimal fields."""
    fields = [to_camel(name) for name in names]
    return tuple(
        Rule(rule=f"double(self.{field}) {comparison}", message=f"{field} {message}", field=field) for field in fields
    )


_WEBHOOKS_HAVE_NAMES = Rule(
    rule="self.notifications.all(one, self.notifications.exists_one(other, other.name == one.name))",
    message=WEBHOOKS_HAVE_NAMES,
    field="notifications",
)

_HOLDS_OUT = "has(self.dataset.evalSource) || double(self.dataset.evalFraction) > 0.0"


def _in_cel(pattern: str) -> str:
    """A regular expression within a text of CEL."""
    return pattern.replace("\\", "\\\\")


RULES: Mapping[type[Model], Mapping[str, tuple[Rule, ...]]] = {
    DatasetSource: {
        "_one_way_to_hold_out": (
            Rule(
                rule="double(self.evalFraction) <= 0.5",
                message="evalFraction must be between 0 and 0.5",
                field="evalFraction",
            ),
            Rule(
                rule="!has(self.evalSource) || double(self.evalFraction) == 0.0",
                message="set evalSource or evalFraction, not both",
                field="evalSource",
            ),
            Rule(
                rule="!has(self.evalSplit) || has(self.evalSource)",
                message="evalSplit is a split of evalSource: set both",
                field="evalSplit",
            ),
        )
    },
    AdapterSpec: {
        "_dropout_is_a_probability": _compared(("dropout",), "< 1.0", "must be at least 0 and below 1"),
        "_experts_are_plain": (
            Rule(
                rule="!self.experts || double(self.dropout) == 0.0",
                message='experts have no dropout in PEFT: set dropout to "0", or leave experts out',
                field="dropout",
            ),
            Rule(
                rule="!self.experts || !self.useDora",
                message="experts have no DoRA in PEFT: leave out useDora or experts",
                field="useDora",
            ),
        ),
    },
    ModelSource: {
        "_chat_template_fits": (
            Rule(
                rule=f"!has(self.chatTemplate) || bytes(self.chatTemplate).size() <= {MAX_CHAT_TEMPLATE_BYTES}",
                message=f"chatTemplate must have at most {MAX_CHAT_TEMPLATE_BYTES} bytes",
                field="chatTemplate",
            ),
            Rule(
                rule="!has(self.chatTemplate) || self.chatTemplate.contains('{{') || self.chatTemplate.contains('{%')"
                f" || self.chatTemplate in {list(CHAT_TEMPLATE_NAMES)}",
                message=f"chatTemplate must be {CHAT_TEMPLATE_RULE}",
                field="chatTemplate",
            ),
        )
    },
    ObjectiveSpec: {
        "_ranges": (
            *_compared(("beta",), "> 0.0", "must be above 0"),
            *_compared(("label_smoothing",), "< 0.5", "must be below 0.5"),
            Rule(
                rule="self.type != 'sft' || double(self.beta) == 0.1",
                message="beta is of preferences: set type to dpo or orpo, or leave beta out",
                field="beta",
            ),
            Rule(
                rule="self.type == 'dpo' || double(self.labelSmoothing) == 0.0",
                message="labelSmoothing is of dpo: set type to dpo, or leave labelSmoothing out",
                field="labelSmoothing",
            ),
        )
    },
    TrainingSpec: {
        "_ranges": (
            *_compared(TRAINING_FIELDS_ABOVE_ZERO, "> 0.0", "must be above 0"),
            *_compared(TRAINING_FIELDS_BELOW_ONE, "< 1.0", "must be below 1"),
            *_compared(("epochs",), f"<= {MAX_EPOCHS}.0", f"must be at most {MAX_EPOCHS}"),
        )
    },
    GenerationSpec: {
        "_metrics_are_told": (
            Rule(
                rule="self.metrics.all(one, self.metrics.exists_one(other, other == one))",
                message="metrics must name each metric once",
                field="metrics",
            ),
            Rule(
                rule="has(self.regex) == ('regex' in self.metrics)",
                message="regex is the pattern of the metric regex: set both or none",
                field="regex",
            ),
        )
    },
    QLoRAJobSpec: {
        "_webhooks_have_names": (_WEBHOOKS_HAVE_NAMES,),
        "_data_fit_the_objective": (
            Rule(
                rule="(self.training.objective.type != 'sft') == (self.dataset.format == 'preference')",
                message=OBJECTIVE_RULE,
                field="training",
            ),
            Rule(
                rule="self.dataset.format != 'preference' || self.dataset.tooLong != 'truncate'",
                message=WHOLE_ANSWERS_RULE,
                field="dataset",
            ),
            Rule(
                rule="self.dataset.format != 'preference' || self.dataset.trainOn != 'all'",
                message=ANSWERS_ALONE_RULE,
                field="dataset",
            ),
            Rule(
                rule="self.dataset.format != 'preference'"
                " || (!has(self.evaluation.generation) && !has(self.evaluation.samples))",
                message=ONE_ANSWER_RULE,
                field="evaluation",
            ),
        ),
        "_there_is_a_way_back": (
            Rule(
                rule="(self.training.onNonFinite != 'rollback' && self.training.onSpike != 'rollback')"
                " || has(self.checkpoint.everySteps)",
                message=ROLLBACK_RULE,
                field="checkpoint.everySteps",
            ),
        ),
        "_metric_is_shown": (
            Rule(
                rule=" && ".join(
                    f"(self.training.objective.type != '{objective}' || self.evaluation.metric in {list(metrics)})"
                    for objective, metrics in HELD_OUT_METRICS.items()
                ),
                message=METRIC_IS_SHOWN,
                field="evaluation.metric",
            ),
            Rule(
                rule=f"self.evaluation.metric == 'loss' || {_HOLDS_OUT}",
                message=METRIC_HOLDS_OUT,
                field="evaluation.metric",
            ),
        ),
        "_prompts_can_be_asked": (
            Rule(
                rule=f"(!has(self.evaluation.generation) && !has(self.evaluation.samples)) || {_HOLDS_OUT}",
                message=ASKING_HOLDS_OUT,
                field="evaluation",
            ),
            Rule(
                rule="(!has(self.evaluation.generation) && !has(self.evaluation.samples))"
                " || (self.dataset.trainOn != 'all' && self.dataset.format != 'text')",
                message=ASKING_KNOWS_ANSWERS,
                field="evaluation",
            ),
        ),
        "_formats_take_the_adapter": (
            Rule(
                rule="!self.adapter.experts || self.publish.formats.size() == 0",
                message=EXPERTS_ARE_NOT_MERGED,
                field="publish.formats",
            ),
            Rule(
                rule="!self.adapter.useDora || !('gguf-adapter' in self.publish.formats)",
                message=DORA_IS_NO_GGUF_ADAPTER,
                field="publish.formats",
            ),
        ),
        "_gate_is_computed": (
            Rule(
                rule="!has(self.tracking.promote) || (has(self.evaluation.generation)"
                " && self.tracking.promote.when.all(one, one.metric in self.evaluation.generation.metrics))",
                message=GATE_IS_COMPUTED,
                field="tracking.promote",
            ),
        ),
    },
    GateRule: {
        "_confidence_is_one": (
            Rule(
                rule="!has(self.confidence) || (double(self.confidence) >= 0.5 && double(self.confidence) < 1.0)",
                message="confidence must be at least 0.5 and below 1",
                field="confidence",
            ),
        )
    },
    PromoteSpec: {
        "_alias_is_free": (
            Rule(
                rule="!self.alias.matches('(?i)^(latest|v[0-9]+)$')",
                message="promote must not move `latest` or `v<number>`, which MLflow reserves",
                field="alias",
            ),
        )
    },
    PublishSpec: {
        "_formats_differ": (
            Rule(
                rule="self.formats.all(one, self.formats.exists_one(other, other == one))",
                message="formats must name each format once",
                field="formats",
            ),
        )
    },
    ModelTrace: {
        "_kinds_are_named": (
            Rule(
                rule=f"self.layers.matches('^[' + '{KIND_LETTERS}'.substring(0, self.kinds.size()) + ']*$')",
                message="layers must be of the kinds that there are",
                field="layers",
            ),
        )
    },
    TrackingSpec: {
        "_registered_model_has_an_address": (
            Rule(
                rule="!has(self.registeredModel) || !self.registeredModel.matches('[/:?]')",
                message="registeredModel must hold none of / : ?, at which MLflow takes addresses apart",
                field="registeredModel",
            ),
            Rule(
                rule="!has(self.registeredModel) || !(self.registeredModel in ['.', '..'])",
                message="registeredModel must not be `.` or `..`, which vanish from URLs",
                field="registeredModel",
            ),
        ),
        "_alias_is_free": (
            Rule(
                rule="!has(self.alias) || !self.alias.matches('(?i)^(latest|v[0-9]+)$')",
                message="alias must not be `latest` or `v<number>`, which MLflow reserves",
                field="alias",
            ),
        ),
        "_promotes_another": (
            Rule(
                rule="!has(self.promote) || !has(self.alias) || self.promote.alias != self.alias",
                message="promote.alias must be another than alias, which moves to every version",
                field="promote",
            ),
        ),
    },
    Estimate: {
        "_items_add_up": (
            Rule(
                rule="self.items.map(item, item.bytes).sum() == self.peakBytes",
                message="peakBytes must be the sum of items[].bytes",
                field="peakBytes",
            ),
        )
    },
    Budget: {
        "_says_how_much": (
            Rule(
                rule="has(self.gpuHours) || has(self.dollars)",
                message="budget must name gpuHours or dollars",
                field="gpuHours",
            ),
        )
    },
    QLoRAQueueSpec: {
        "_webhooks_have_names": (_WEBHOOKS_HAVE_NAMES,),
        "_turns_are_everybodys": (
            Rule(
                rule="!has(self.turnSeconds) || self.fairSharing == 'None'",
                message="turnSeconds gives every job its turn, so fairSharing must be None beside it",
                field="fairSharing",
            ),
        ),
        "_one_quota_a_class": (
            Rule(
                rule="self.quotas.all(one, self.quotas.exists_one(other, other.gpuClass == one.gpuClass))",
                message="quotas must name each gpuClass once",
                field="quotas",
            ),
        ),
    },
    DecimalRange: {"_in_order": (Rule(rule="double(self.min) < double(self.max)", message=ORDER_RULE, field="max"),)},
    LogRange: {
        "_in_order": (
            Rule(rule="double(self.min) > 0.0", message=LOG_RULE, field="min"),
            Rule(
                rule="double(self.min) <= 0.0 || double(self.min) < double(self.max)", message=ORDER_RULE, field="max"
            ),
        )
    },
    IntegerRange: {"_in_order": (Rule(rule="self.min < self.max", message=ORDER_RULE, field="max"),)},
    SweepDimension: {
        "_one_way_that_fits": (
            Rule(
                rule="[has(self.choice), has(self.uniform), has(self.logUniform), has(self.integer)]"
                ".filter(one, one).size() == 1",
                message=ONE_WAY_RULE,
                field="field",
            ),
            Rule(
                rule=f"self.field in {list(DECIMAL_FIELDS)} || !(has(self.uniform) || has(self.logUniform))",
                message=DECIMAL_RULE,
                field="field",
            ),
            Rule(
                rule=f"self.field in {list(INTEGER_FIELDS)} || !has(self.integer)",
                message=INTEGER_RULE,
                field="integer",
            ),
            Rule(
                rule=f"!has(self.choice) || (self.field in {list(DECIMAL_FIELDS)}"
                f" ? self.choice.all(one, one.matches('{_in_cel(DECIMAL_PATTERN)}'))"
                f" : !(self.field in {list(INTEGER_FIELDS)}) || "
                f"self.choice.all(one, one.matches('{_in_cel(INTEGER_PATTERN)}')))",
                message=CHOICE_RULE,
                field="choice",
            ),
            Rule(
                rule="!has(self.choice) || self.choice.all(one, self.choice.exists_one(other, other == one))",
                message=CHOICES_DIFFER_RULE,
                field="choice",
            ),
        )
    },
    QLoRASweepSpec: {
        "_fields_differ": (
            Rule(
                rule="self.space.all(one, self.space.exists_one(other, other.field == one.field))",
                message=FIELDS_DIFFER_RULE,
                field="space",
            ),
        ),
        "_metric_is_logged": (
            Rule(
                rule="self.metric.name != 'eval/loss' || has(self.job.dataset.evalSource)"
                " || double(self.job.dataset.evalFraction) > 0.0",
                message=METRIC_RULE,
                field="metric",
            ),
        ),
        "_gate_is_the_sweeps": (
            Rule(rule="!has(self.job.tracking.promote)", message=GATE_RULE, field="job.tracking.promote"),
        ),
        "_rungs_have_figures": (
            Rule(
                rule="!has(self.earlyStop) || self.earlyStop.firstStep % self.job.evaluation.everySteps == 0",
                message=RUNGS_RULE,
                field="earlyStop",
            ),
        ),
        "_alias_is_free": (
            Rule(
                rule="!has(self.promote) || !self.promote.matches('(?i)^(latest|v[0-9]+)$')",
                message="promote must not be `latest` or `v<number>`, which MLflow reserves",
                field="promote",
            ),
        ),
    },
}
"""CEL for every validator, by model and the validator's name, in the validator's words."""


def _immutable(field: str) -> Rule:
    """Neither changed nor set nor taken away (an optional comparison would say it shorter, at an unbounded cost)."""
    return Rule(
        rule=f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        message=f"spec.{field} cannot be changed, because the work done so far depends on it; submit a new job instead",
        field=field,
    )


IMMUTABLE = tuple(_immutable(field) for field in IMMUTABLE_SPEC_FIELDS)
SWEEP_IMMUTABLE = tuple(_immutable(field) for field in SWEEP_IMMUTABLE_FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of `kubectl get`; it takes one field as it is, or nothing where that is absent."""

    name: str
    kind: str
    path: str
    description: str
    wide: bool = False

    def to_wire(self) -> Json:
        """The entry of `additionalPrinterColumns`."""
        shown = {"name": self.name, "type": self.kind, "jsonPath": self.path, "description": self.description}
        return {**shown, "priority": 1} if self.wide else shown


AGE = Column(name="Age", kind="date", path=".metadata.creationTimestamp", description="Since when the object exists.")
JOB_COLUMNS = (
    Column(name="Queue", kind="string", path=".spec.queue", description="The queue that the job waits in."),
    Column(name="Priority", kind="integer", path=".spec.priority", description="Higher goes first."),
    Column(name="State", kind="string", path=".status.summary", description="What goes on and what it waits for."),
    Column(name="GPU", kind="string", path=".status.estimate.gpuClass", description="The GPU class it is sized for."),
    Column(name="Step", kind="integer", path=".status.progress.step", description="Optimizer steps made."),
    Column(name="Of", kind="integer", path=".status.progress.steps", description="Optimizer steps in all."),
    Column(name="ETA-Seconds", kind="number", path=".status.progress.etaSeconds", description="Left to train."),
    AGE,
    Column(name="Loss", kind="number", path=".status.progress.loss", description="Latest training loss.", wide=True),
    Column(name="Run", kind="string", path=".status.mlflow.runId", description="The job's MLflow run.", wide=True),
    Column(name="Model", kind="string", path=".status.mlflow.registeredModel", description="In MLflow.", wide=True),
    Column(name="Version", kind="string", path=".status.mlflow.modelVersion", description="In MLflow.", wide=True),
)
QUEUE_COLUMNS = (
    Column(name="Cohort", kind="string", path=".spec.cohort", description="Queues that lend each other quota."),
    Column(name="Weight", kind="integer", path=".spec.weight", description="Fair share relative to others."),
    Column(name="Preemption", kind="string", path=".spec.preemption", description="Whom its jobs may evict."),
    Column(name="Stop", kind="string", path=".spec.stopPolicy", description="Whether nothing is admitted."),
    Column(name="Pending", kind="integer", path=".status.pending", description="Jobs that wait for a GPU."),
    Column(name="Running", kind="integer", path=".status.running", description="Jobs that hold a GPU."),
    Column(name="Pending-Since", kind="date", path=".status.pendingSince", description="The longest wait.", wide=True),
    AGE,
)
SWEEP_COLUMNS = (
    Column(name="State", kind="string", path=".status.summary", description="What goes on."),
    Column(name="Trials", kind="integer", path=".spec.trials", description="Trials in all."),
    Column(name="Running", kind="integer", path=".status.running", description="Trials that are there."),
    Column(name="Succeeded", kind="integer", path=".status.succeeded", description="Trials that have."),
    Column(name="Stopped", kind="integer", path=".status.stopped", description="Trials that earlyStop ended."),
    Column(name="Failed", kind="integer", path=".status.failed", description="Trials that have."),
    Column(name="Best", kind="string", path=".status.best.job", description="The best trial's job."),
    Column(name="Value", kind="number", path=".status.best.value", description="Its metric."),
    AGE,
)


def custom_resource_definitions() -> Sequence[Json]:
    """The manifests."""
    jobs = _definition(QLoRAJob, short="qj", scope="Namespaced", columns=JOB_COLUMNS)
    queues = _definition(QLoRAQueue, short="qq", scope="Cluster", columns=QUEUE_COLUMNS)
    sweeps = _definition(QLoRASweep, short="qs", scope="Namespaced", columns=SWEEP_COLUMNS)
    return jobs, queues, sweeps


def _definition(kind: type[Model], *, short: str, scope: str, columns: tuple[Column, ...]) -> Json:
    group, version = API_VERSION.split("/")
    singular = kind.__name__.lower()
    served: Json = {
        "name": version,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [column.to_wire() for column in columns],
        "schema": {"openAPIV3Schema": _object(kind)},
        **({"subresources": {"status": {}}} if "status" in kind.model_fields else {}),
    }
    names = {
        "kind": kind.__name__,
        "listKind": f"{kind.__name__}List",
        "plural": f"{singular}s",
        "singular": singular,
        "shortNames": [short],
        "categories": [CATEGORY],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{singular}s.{group}"},
        "spec": {"group": group, "names": names, "scope": scope, "versions": [served]},
    }


def _object(kind: type[Model]) -> Json:
    """The schema of a whole object; the API server knows the metadata but for the bounds of the name."""
    document: Json = kind.model_json_schema(by_alias=True)
    models: Json = document["$defs"]
    properties: Json = {
        "apiVersion": {"type": "string", "description": f"`{API_VERSION}`."},
        "kind": {"type": "string", "description": f"`{kind.__name__}`."},
        "metadata": {"type": "object"},
        "spec": _Converter(models, with_defaults=True).converted(document["properties"]["spec"]),
    }
    if "status" in kind.model_fields:
        properties["status"] = _Converter(models, with_defaults=False).converted(document["properties"]["status"])
    required = [name for name in document["required"] if name != "metadata"]
    return {
        "type": "object",
        "description": document["description"],
        **({"required": required} if required else {}),
        "properties": properties,
        "x-kubernetes-validations": [_name_rule(kind).to_wire()],
    }


def _name_rule(kind: type[Model]) -> Rule:
    """The name as the model bounds it: the server's own rule allows dots and more characters."""
    meta = kind.model_fields["metadata"].annotation
    assert isinstance(meta, type), "every kind has it"
    assert issubclass(meta, ObjectMeta), "every kind has it"
    name: Json = meta.model_json_schema()["properties"]["name"]
    pattern, limit = name["pattern"], name["maxLength"]
    return Rule(
        rule=f"self.metadata.name.size() <= {limit} && self.metadata.name.matches('{pattern}')",
        message=f"metadata.name must be a DNS label of at most {limit} characters, because others are made from it",
    )


_COPIED = frozenset(
    {"type", "description", "format", "enum", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}
    | {"maxProperties"}
)
_CONVERTED = frozenset(
    {"$ref", "anyOf", "title", "default", "const", "pattern", "properties", "required", "items"}
    | {"additionalProperties", "propertyNames"}
)
_NULL: Json = {"type": "null"}


@dataclass(frozen=True, slots=True)
class _Converter:
    """Turns the JSON schemas of pydantic into structural schemas."""

    models: Json
    with_defaults: bool

    def converted(self, node: Json) -> Json:
        """One node and all under it."""
        is_null_kept = _NULL in node.get("anyOf", []) and node.get("default") is not None
        node = self._resolved(node)
        if unknown := set(node) - _COPIED - _CONVERTED:
            raise TypeError(f"{node.get('title')}: no structural schema says {', '.join(sorted(unknown))}")
        schema: Json = {key: value for key, value in node.items() if key in _COPIED}
        if self.with_defaults and node.get("default") is not None:
            schema["default"] = _without_null(node["default"])
        if is_null_kept:
            schema["nullable"] = True
        if "const" in node:
            schema["enum"] = [node["const"]]
        if "pattern" in node:
            schema["pattern"] = _re2(node["pattern"])
        if schema.get("type") == "integer":
            schema["format"] = "int64"
        if "items" in node:
            schema["items"] = self.converted(node["items"])
        if "anyOf" in node:
            return schema | self._word_or_list(*node["anyOf"])
        if "properties" in node:
            return schema | self._fields(node)
        return schema | self._map(node) if schema.get("type") == "object" else schema

    def _resolved(self, node: Json) -> Json:
        """Follow the node's reference and leave null out; what the field says goes before what its type says."""
        options = [option for option in node.get("anyOf", []) if option != _NULL]
        outer = {key: value for key, value in node.items() if key != "$ref"}
        if len(options) == 1:
            del outer["anyOf"]
            return {**self._resolved(options[0]), **outer}
        return {**self.models[node["$ref"].rsplit("/", 1)[1]], **outer} if "$ref" in node else outer

    def _fields(self, node: Json) -> Json:
        name = str(node["title"])
        properties = {field: self.converted(child) for field, child in node["properties"].items()}
        for (model, field), key in LIST_MAP_KEYS.items():
            if model == name:
                properties[field] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
        rules = [rule.to_wire() for rule in _rules(name)]
        return {
            **({"required": node["required"]} if "required" in node else {}),
            "properties": properties,
            **({"x-kubernetes-validations": rules} if rules else {}),
        }

    def _map(self, node: Json) -> Json:
        """A map; the bounds of its keys take a rule."""
        limit = node["propertyNames"]["maxLength"]
        rule = Rule(rule=f"self.all(key, key.size() <= {limit})", message=f"keys have at most {limit} characters")
        values = self.converted(node["additionalProperties"])
        return {"additionalProperties": values, "x-kubernetes-validations": [rule.to_wire()]}

    def _word_or_list(self, word: Json, items: Json) -> Json:
        """A fixed word or a list of texts.

        Structural schemas have no unions of types, but a field without a type takes anything. Only a list can fail
        `minItems`, so that only a list can satisfy its negation.
        """
        listed = {"minItems": items["minItems"], "not": {"minItems": items["maxItems"] + 1}}
        return {
            "x-kubernetes-preserve-unknown-fields": True,
            "anyOf": [{"enum": [word["const"]]}, listed],
            "items": self.converted(items["items"]),
        }


def _rules(name: str) -> tuple[Rule, ...]:
    """The rules of a model, all of its validators covered."""
    model = next(model for model in Model.__subclasses__() if model.__name__ == name)
    decorators = model.__pydantic_decorators__
    validators = {*decorators.field_validators, *decorators.model_validators}
    rules = RULES.get(model, {})
    if differing := validators ^ set(rules):
        raise TypeError(f"{name}: validators and RULES differ in {', '.join(sorted(differing))}")
    own = tuple(rule for of_one in rules.values() for rule in of_one)
    if model is QLoRASweepSpec:
        return own + SWEEP_IMMUTABLE
    return own + IMMUTABLE if model is QLoRAJobSpec else own


def _without_null(default: Any) -> Any:
    """A default without the fields that have none; it is whole, because rules are tried on it as it stands."""
    if not isinstance(default, dict):
        return default
    return {name: _without_null(value) for name, value in cast(Json, default).items() if value is not None}


def _re2(pattern: str) -> str:
    r"""The pattern as the API server's RE2 reads it: there `\s` is ASCII alone."""
    return pattern.replace(r"[^\s]", r"[^\s\v\x{85}\p{Z}]")
