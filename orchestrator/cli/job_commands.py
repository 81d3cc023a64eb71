"""The commands that look at jobs and steer them.

Imports of the SDK stand inside the functions: `qlora --help` and shell completion must be quick.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.completion import complete_listed
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.formats import DataFormat, Kind, Stage, TableFormat
from orchestrator.cli.options import (
    Changes,
    DryRun,
    JobName,
    JobNames,
    Manifest,
    Model,
    Namespace,
    Output,
    Replace,
    Timeout,
)

if TYPE_CHECKING:
    from orchestrator.api.job import QLoRAJob
    from orchestrator.sdk.client import Client
    from orchestrator.sdk.handle import JobHandle
    from orchestrator.sdk.manifest import UserObject

SHOWN_BY_INIT = 3
WATCH_STEP_SECONDS = 5.0
"""`get --watch` draws anew at least so often, so that ages stay right."""


def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A .jsonl, .json, .csv or .parquet file of records.")],
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="SPEC.YAML", help="The manifest to write.")] = Path(
        "job.yaml"
    ),
    look: Annotated[
        bool, typer.Option("--look/--no-look", help="Show three records as they will be trained, and the plan.")
    ] = True,
) -> None:
    """Write a manifest for a file of records, whose format is found in the first one, and show what will be trained."""
    from orchestrator.cli.console import say
    from orchestrator.cli.output import print_text, write_new
    from orchestrator.sdk import first_job
    from orchestrator.sdk.manifest import parse_manifest

    text = first_job.manifest(data, model or first_job.DEFAULT_MODEL, output.parent)
    objects = parse_manifest(text, name=str(output), folder=output.resolve().parent)
    write_new(output, text)
    print_text(f"{output} written: {first_job.format_of(data)} records")
    if look:
        _look_at(only_job(objects, output))
    say(f"next: look at {output}, then: qlora run {output}", style="quiet")


def _look_at(job: QLoRAJob) -> None:
    """The first records and the plan, as far as they can be had from here: a model may be out of reach for now."""
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.plan_view import show_plan
    from orchestrator.cli.records_view import legend, show_records, template_words
    from orchestrator.errors import OrchestratorError

    client = connect(None)
    say(template_words(job.spec), style="quiet")
    try:
        shown = client.records(job, SHOWN_BY_INIT)
        say(legend(answers()), style="quiet")
        show_records(answers(), shown)
    except OrchestratorError as error:
        say(f"records not shown: {error}", style="waiting")
    try:
        show_plan(answers(), client.plan(job))
    except OrchestratorError as error:
        say(f"no plan: {error}", style="waiting")


def submit(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="SPEC.YAML", help="Manifests; - reads standard input.")
    ] = None,
    filename: Annotated[
        list[Path] | None, typer.Option("--filename", "-f", metavar="SPEC.YAML", help="A manifest; may be repeated.")
    ] = None,
    changes: Changes = None,
    replace: Replace = False,
    namespace: Namespace = None,
    dry_run: DryRun = False,
    output: Output = None,
) -> None:
    """Check manifests and hand their jobs, queues and sweeps to the service."""
    from orchestrator.api.job import QLoRAJob
    from orchestrator.api.sweep import QLoRASweep
    from orchestrator.cli.console import say
    from orchestrator.cli.output import print_data, print_text, wire
    from orchestrator.errors import ServiceNotRunning

    paths = [*(files or ()), *(filename or ())]
    if not paths:
        raise typer.BadParameter("name at least one manifest")
    client = connect(namespace)
    objects = [item for path in paths for item in load(path, namespace, changes)]
    checked = [_checked(client, item, replace) for item in objects]  # all, before any is stored
    _require_distinct(checked)
    if dry_run:
        print_dry_run(client, checked, output)
        return
    if not client.connection.is_running():
        raise ServiceNotRunning("the service is not running, so nothing would run the jobs; start it: qlora up")
    stored = [store_object(client, item, replace, say) for item in checked]
    if output is not None:
        print_data([wire(item) for item in stored], output)
        return
    for item in stored:
        verb = "submitted" if isinstance(item, QLoRAJob | QLoRASweep) else "applied"
        print_text(f"{_reference(item)} {verb}")
    last = next((item for item in reversed(stored) if isinstance(item, QLoRAJob)), None)
    if last is not None and sys.stderr.isatty():
        say(f"follow it: qlora wait {last.metadata.name}{_in_namespace(last)}", style="quiet")


def _checked(client: Client, item: UserObject, replace: bool) -> UserObject:
    from orchestrator.api.job import QLoRAJob
    from orchestrator.api.sweep import QLoRASweep

    if isinstance(item, QLoRASweep):
        return client.check_sweep(item)
    return client.check(item, replace=replace) if isinstance(item, QLoRAJob) else item


def store_object(client: Client, item: UserObject, replace: bool, told: Callable[[str], None]) -> UserObject:
    """Hand one object to the service."""
    from orchestrator.api.job import QLoRAJob
    from orchestrator.api.sweep import QLoRASweep

    if isinstance(item, QLoRASweep):
        return client.sweep(item, told=told)
    if isinstance(item, QLoRAJob):
        return client.submit(item, replace=replace, told=told).object()
    return client.apply_queue(item)


def get(
    kind: Annotated[Kind, typer.Argument(metavar="jobs|queues", help="What to list.", show_default=True)] = Kind.JOBS,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this one.", autocompletion=complete_listed)
    ] = None,
    namespace: Namespace = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Jobs of every namespace.")] = False,
    output: Annotated[
        TableFormat, typer.Option("--output", "-o", metavar="table|wide|json|yaml|name", help="How to answer.")
    ] = TableFormat.TABLE,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show again after every change, until Ctrl-C.")] = False,
) -> None:
    """List jobs or queues."""
    client = connect(namespace)
    show: Callable[[], None] = lambda: _show_list(client, kind, name, all_namespaces, output)  # noqa: E731  a thunk
    if not watch:
        show()
        return
    from orchestrator.cli.console import answers

    cursor = ""
    while True:
        cursor = client.connection.store.wait_for_change(cursor, WATCH_STEP_SECONDS)
        if answers().is_terminal:
            answers().clear()
        show()
        time.sleep(0.5)  # changes may come many a second


def describe(name: JobName, namespace: Namespace = None, output: Output = None) -> None:
    """Show one job's whole story: spec, estimate, conditions, attempts, results, events."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.describe import show_job
    from orchestrator.cli.output import print_data, wire
    from orchestrator.sdk.job_fields import spec_digest

    client = connect(namespace)
    handle = client.handle(name)
    job, events = handle.object(), handle.events()
    if output is None:
        show_job(answers(), job, events, datetime.now(UTC))
        _say_if_down(client, [job])
        return
    told = [
        {"time": at, "reason": event.reason.value, "message": event.message, "warning": event.warning}
        for at, event in events
    ]
    print_data({"job": wire(job), "specDigest": spec_digest(job), "events": told}, output)


def logs(
    name: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has finished.")] = False,
    stage: Annotated[
        Stage | None, typer.Option("--stage", metavar="prepare|train|publish", help="Only this stage.")
    ] = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", metavar="NUMBER", min=1, help="Only this attempt.")
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", metavar="LINES", min=0, help="Only so many of the last lines, and new ones.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Lines just as the stages wrote them.")] = False,
    namespace: Namespace = None,
) -> None:
    """Print what the job's stages wrote, every attempt in order."""
    from orchestrator.cli.console import say
    from orchestrator.cli.output import print_text
    from orchestrator.sdk.log_text import log_text

    handle = connect(namespace).handle(name)
    current: tuple[str, int] | None = None
    for line in handle.logs(follow=follow, stage=stage.value if stage else None, attempt=attempt, tail=tail):
        if current != (line.stage, line.attempt):
            current = (line.stage, line.attempt)
            say(f"--- {line.stage}, attempt {line.attempt} ---", style="quiet")
        print_text(line.text if raw else log_text(line.text))
    if current is None:
        say(f"nothing has been written yet: {handle.status().summary or 'no stage has started'}", style="quiet")


def wait(name: JobName, timeout: Timeout = None, namespace: Namespace = None, output: Output = None) -> None:
    """Follow a job until it has finished; the exit status says how it ended."""
    finish_following(connect(namespace).handle(name), timeout, output)


def cancel(names: JobNames, namespace: Namespace = None, dry_run: DryRun = False) -> None:
    """End jobs for good. Their checkpoints and metrics stay."""
    for handle in _handles(names, namespace):
        _steer(handle, "cancel", dry_run)


def suspend(names: JobNames, namespace: Namespace = None, dry_run: DryRun = False) -> None:
    """Hold jobs: a running stage saves a checkpoint and stops."""
    for handle in _handles(names, namespace):
        _steer(handle, "suspend", dry_run)


def resume(names: JobNames, namespace: Namespace = None, dry_run: DryRun = False) -> None:
    """Let suspended jobs go on from their checkpoints."""
    for handle in _handles(names, namespace):
        _steer(handle, "resume", dry_run)


def promote(
    name: JobName,
    force: Annotated[
        bool, typer.Option("--force", help="Even though the gate did not let it pass; needs --reason.")
    ] = False,
    reason: Annotated[
        str,
        typer.Option("--reason", metavar="TEXT", help="Why it is forced; the version keeps it.", show_default=False),
    ] = "",
    namespace: Namespace = None,
    dry_run: DryRun = False,
) -> None:
    """Approve a published job: the alias of spec.tracking.promote moves to its version."""
    from orchestrator.cli.output import print_text

    handle = connect(namespace).handle(name)
    if dry_run:
        print_text(f"job/{handle.name}: {handle.check_promotion(force=force, reason=reason)}")
    else:
        print_text(f"job/{handle.name}: {handle.promote(force=force, reason=reason)}")


def delete(names: JobNames, namespace: Namespace = None, dry_run: DryRun = False) -> None:
    """Remove jobs; a running stage is stopped. MLflow and the jobs' store keep what they have."""
    from orchestrator.cli.output import print_text
    from orchestrator.errors import NotFound

    for handle in _handles(names, namespace):
        if dry_run:
            print_text(f"job/{handle.name} would be deleted")
            continue
        handle.delete()
        try:
            handle.object()
        except NotFound:
            print_text(f"job/{handle.name} deleted")
        else:
            print_text(f"job/{handle.name} marked for deletion; it goes once its stage has stopped")


def download(
    name: JobName,
    into: Annotated[
        Path | None,
        typer.Option("--into", metavar="FOLDER", help="Where to; NAME-adapter by default.", show_default=False),
    ] = None,
    namespace: Namespace = None,
) -> None:
    """Download a job's adapter as a folder that PEFT loads, every file verified."""
    from orchestrator.cli.output import print_text

    print_text(str(connect(namespace).handle(name).adapter(into or Path(f"{name}-adapter"))))


def chat(
    name: JobName,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and end.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, max=4096, help="Of an answer.")
    ] = 256,
    namespace: Namespace = None,
) -> None:
    """Talk to a finished adapter on this machine, with its base in 4 bits; lines are chat turns, /exit ends."""
    connect(namespace).handle(name).chat(prompt, max_new_tokens=max_new_tokens)


def plan(
    spec: Manifest,
    changes: Changes = None,
    namespace: Namespace = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --output json.")] = False,
    output: Output = None,
) -> None:
    """Say what a job would take and where it would run, before anything runs."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.output import print_data
    from orchestrator.cli.plan_view import show_plan

    answer = connect(namespace).plan(only_job(load(spec, namespace, changes), spec))
    form = DataFormat.JSON if as_json else output
    if form is not None:
        print_data(answer.to_wire(), form)
    else:
        show_plan(answers(), answer)
    if answer.refusal is not None:
        raise typer.Exit(ExitStatus.INVALID)


def prepare(
    job: Annotated[str, typer.Argument(metavar="SPEC.YAML|NAME", help="A manifest, or a job that is prepared.")],
    show: Annotated[int, typer.Option("--show", metavar="RECORDS", min=1, max=100, help="How many to read.")] = 3,
    changes: Changes = None,
    namespace: Namespace = None,
    output: Output = None,
) -> None:
    """Show records as they are trained: what carries loss, what is context. Starts nothing."""
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.output import print_data
    from orchestrator.cli.records_view import legend, show_records, template_words

    client, path = connect(namespace), Path(job)
    if job == "-" or path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        described = only_job(load(path, namespace, changes), path)
        shown = client.records(described, show)
        say(template_words(described.spec), style="quiet")
    else:
        shown = client.handle(job).records()
        shown = shown.model_copy(update={"records": shown.records[:show]})
    if output is not None:
        print_data(shown.to_wire(), output)
        return
    say(legend(answers()), style="quiet")
    show_records(answers(), shown)
    for warning in shown.warnings:
        say(f"warning: {warning}", style="waiting")


def calibration(
    as_json: Annotated[bool, typer.Option("--json", help="The same as --output json.")] = False,
    output: Output = None,
) -> None:
    """Say how predicted peaks compare with measured ones, and which margins follow."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.output import print_columns, print_data
    from orchestrator.cli.tables import calibration_table

    found = connect(None).calibration()
    form = DataFormat.JSON if as_json else output
    if form is not None:
        print_data({"bounds": [bound.to_wire() for bound in found]}, form)
    else:
        print_columns(answers(), calibration_table(found))


def explain(name: JobName, namespace: Namespace = None, output: Output = None) -> None:
    """Say why a job is where it is, by the code that decides."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.describe import show_explanation
    from orchestrator.cli.output import print_data

    explanation = connect(namespace).handle(name).explain()
    if output is not None:
        print_data(explanation.to_wire(), output)
        return
    show_explanation(answers(), explanation)


def simulate(
    gpus: Annotated[
        list[str] | None,
        typer.Option(
            "--gpus",
            metavar="CLASS=GPUS",
            help="+2 more of a class, -2 fewer, or 2 in all; repeat.",
            show_default=False,
        ),
    ] = None,
    quotas: Annotated[
        list[str] | None,
        typer.Option("--quota", metavar="QUEUE:CLASS=GPUS", help="The same of a queue; repeat.", show_default=False),
    ] = None,
    jobs: Annotated[
        list[Path] | None,
        typer.Option("--job", metavar="SPEC.YAML", help="A job that is submitted now; repeat.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Instead of the jobs that are here: a CSV or JSONL file of jobs, played on its queues and GPUs.",
            show_default=False,
        ),
    ] = None,
    namespace: Namespace = None,
    output: Output = None,
) -> None:
    """Say when jobs would start and end with other GPUs, quotas or jobs, by the code that decides. Changes nothing."""
    from orchestrator.cli.console import answers
    from orchestrator.cli.describe import show_simulation, show_trace
    from orchestrator.cli.output import print_data
    from orchestrator.errors import InvalidObject

    if trace is not None:
        if jobs:
            raise InvalidObject("--job and --trace cannot be combined: put the job into the trace")
        outcome = connect(namespace).simulate_trace(trace, gpus=gpus or (), quotas=quotas or ())
        if output is not None:
            print_data(outcome.to_wire(), output)
        else:
            show_trace(answers(), outcome)
        return
    added = [only_job(load(path, namespace), path) for path in jobs or ()]
    found = connect(namespace).simulate(gpus=gpus or (), quotas=quotas or (), jobs=added)
    if output is not None:
        print_data(found.to_wire(), output)
    else:
        show_simulation(answers(), found)


def connect(namespace: str | None) -> Client:
    """A client of the service that was asked for."""
    from orchestrator.sdk.client import Client

    return Client(namespace=namespace)


def load(path: Path, namespace: str | None, changes: Sequence[str] | None = None) -> tuple[UserObject, ...]:
    """The objects of a manifest or of standard input, in the namespace and with the fields that were asked for."""
    from orchestrator.api.queue import QLoRAQueue
    from orchestrator.errors import InvalidObject
    from orchestrator.sdk.manifest import load_manifest, parse_changes, parse_manifest

    fields = parse_changes(changes or ())
    if str(path) == "-":
        objects = parse_manifest(sys.stdin.read(), name="standard input", folder=Path.cwd(), changes=fields)
    else:
        objects = load_manifest(path, changes=fields)
    for item in objects:
        written = item.metadata.namespace if "namespace" in item.metadata.model_fields_set else namespace
        if not isinstance(item, QLoRAQueue) and namespace not in (None, written):
            raise InvalidObject(
                f"{path}: {_word(item)} {item.metadata.name} is in namespace {written}, not {namespace}; "
                "leave out --namespace, or correct one of them"
            )
    return objects


def first_objects(data: Path, model: str | None, changes: Sequence[str] | None) -> tuple[UserObject, ...]:
    """The job that `init` would write for a file of records."""
    from orchestrator.sdk import first_job
    from orchestrator.sdk.manifest import parse_changes, parse_manifest

    text = first_job.manifest(data, model or first_job.DEFAULT_MODEL, Path.cwd())
    return parse_manifest(text, name=f"the job of {data}", folder=Path.cwd(), changes=parse_changes(changes or ()))


def only_job(objects: Sequence[UserObject], path: Path | None) -> QLoRAJob:
    """The one job of a manifest."""
    from orchestrator.api.job import QLoRAJob
    from orchestrator.errors import InvalidObject

    jobs = [item for item in objects if isinstance(item, QLoRAJob)]
    if len(jobs) != 1:
        raise InvalidObject(f"{path} holds {len(jobs)} jobs where one is wanted; for several use: qlora submit")
    return jobs[0]


def finish_following(handle: JobHandle, timeout_seconds: float | None, output: DataFormat | None) -> None:
    """Follow a job to its end, print what came of it, and exit with the status that says so."""
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.follow import Interruption, ask_about_interruption, follow, result_lines, result_panel
    from orchestrator.cli.output import print_data, print_text, wire
    from orchestrator.sdk.handle import succeeded

    while True:
        try:
            job = follow(handle, timeout_seconds)
            break
        except KeyboardInterrupt:
            choice = ask_about_interruption()
            if choice is Interruption.CANCEL:
                handle.cancel()
            elif choice is Interruption.DETACH:
                back = f"qlora wait {handle.name}{_namespace_option(handle.namespace)}"
                say(f"detached; the job goes on. Come back: {back}")
                raise typer.Exit(ExitStatus.INTERRUPTED) from None
    if output is not None:
        print_data(wire(job), output)
    if not succeeded(job):
        say(_how_it_ended(job), style="bad")
        say(f"its logs: qlora logs {job.metadata.name}{_in_namespace(job)}", style="quiet")
        raise typer.Exit(ExitStatus.JOB_FAILED)
    if output is None and answers().is_terminal:
        answers().print(result_panel(job, handle.result()))
    elif output is None:
        print_text(result_lines(job, handle.result()))


def _how_it_ended(job: QLoRAJob) -> str:
    from orchestrator.core.job.state_machine import JobState, state_of

    if state_of(job.status) is JobState.CANCELLED:
        return f"job {job.key} was cancelled"
    return f"job {job.key} did not succeed: {job.status.summary}"


def _show_list(client: Client, kind: Kind, name: str | None, all_namespaces: bool, form: TableFormat) -> None:
    from orchestrator.api.job import QLoRAJob
    from orchestrator.api.queue import QLoRAQueue
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.output import print_columns, print_data, print_text, wire
    from orchestrator.cli.tables import job_table, queue_table

    items = _jobs(client, name, all_namespaces) if kind is Kind.JOBS else _queues(client, name)
    if form in (TableFormat.JSON, TableFormat.YAML):
        data = [wire(item) for item in items]
        print_data(data[0] if name is not None else data, DataFormat(form.value))
    elif form is TableFormat.NAME:
        for item in items:
            print_text(_reference(item))
    elif not items:
        say(f"no {kind.value}{'' if all_namespaces or kind is Kind.QUEUES else f' in namespace {client.namespace}'}")
    elif kind is Kind.QUEUES:
        queues = [item for item in items if isinstance(item, QLoRAQueue)]
        print_columns(answers(), queue_table(queues, client.list(all_namespaces=True), datetime.now(UTC)))
    else:
        jobs = [item for item in items if isinstance(item, QLoRAJob)]
        wide = form is TableFormat.WIDE
        print_columns(answers(), job_table(jobs, datetime.now(UTC), wide=wide, namespaces=all_namespaces))
        _say_if_down(client, jobs)


def _say_if_down(client: Client, jobs: Sequence[QLoRAJob]) -> None:
    """Why nothing happens, where that is because nobody is at work."""
    from orchestrator.cli.console import say
    from orchestrator.sdk.handle import is_finished

    if not all(map(is_finished, jobs)) and not client.connection.is_running():
        say("the service is not running, so nothing happens until: qlora up", style="waiting")


def _jobs(client: Client, name: str | None, all_namespaces: bool) -> Sequence[UserObject]:
    if name is not None:
        return [client.get(name)]
    return client.list(all_namespaces=all_namespaces)


def _queues(client: Client, name: str | None) -> Sequence[UserObject]:
    return client.list_queues() if name is None else [client.get_queue(name)]


def _handles(names: Sequence[str], namespace: str | None) -> list[JobHandle]:
    """Handles on jobs that are all there: of several names, one that is wrong changes nothing."""
    client = connect(namespace)
    return [client.handle(name) for name in dict.fromkeys(names)]


def _steer(handle: JobHandle, verb: str, dry_run: bool) -> None:
    """Cancel, suspend or resume, and say what that means for this job."""
    from orchestrator.cli.output import print_text
    from orchestrator.sdk.handle import is_finished

    past = {"cancel": "cancelled", "suspend": "suspended", "resume": "resumed"}[verb]
    before = handle.object()
    if is_finished(before):
        print_text(f"job/{handle.name} has finished already: {before.status.summary}")
        return
    if dry_run:
        print_text(f"job/{handle.name} would be {past}")
        return
    after = {"cancel": handle.cancel, "suspend": handle.suspend, "resume": handle.resume}[verb]()
    unchanged = after.metadata.resource_version == before.metadata.resource_version
    asked = "is being " if verb != "resume" and after.status.active_attempt is not None else ""
    print_text(f"job/{handle.name} {'is already' if unchanged else asked + past}{f' {past}' if unchanged else ''}")


def print_dry_run(client: Client, checked: Sequence[UserObject], output: DataFormat | None) -> None:
    """What would be stored, and what each job would take as far as its model can be read from here."""
    from orchestrator.api.job import QLoRAJob
    from orchestrator.cli.console import answers, say
    from orchestrator.cli.output import print_data, print_text, wire
    from orchestrator.cli.plan_view import show_plan
    from orchestrator.errors import OrchestratorError

    if output is not None:
        print_data([wire(item) for item in checked], output)
        return
    for item in checked:
        print_text(f"{_reference(item)} is valid; nothing was changed")
        if isinstance(item, QLoRAJob):
            try:
                show_plan(answers(), client.plan(item))
            except OrchestratorError as error:
                say(f"no plan: {error}", style="quiet")


def _require_distinct(objects: Sequence[UserObject]) -> None:
    from orchestrator.errors import AlreadyExists

    keys = [(item.kind, item.metadata.namespace, item.metadata.name) for item in objects]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise AlreadyExists(f"{twice[0]} {twice[2]} stands more than once in the manifests; give each its own name")


def _reference(item: UserObject) -> str:
    return f"{_word(item)}/{item.metadata.name}"


def _word(item: UserObject) -> str:
    return item.kind.removeprefix("QLoRA").lower()


def _in_namespace(job: QLoRAJob) -> str:
    return _namespace_option(job.metadata.namespace)


def _namespace_option(namespace: str) -> str:
    return "" if namespace == "default" else f" -n {namespace}"
