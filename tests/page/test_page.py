"""The service's page from outside: what it shows, to whom, in what time, and what it never does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.page import measure
from orchestrator.adapters.mlflow.run_reader import RunFigures, Table
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.core.explain import explain
from orchestrator.errors import Forbidden, StoreUnavailable, TrackingUnavailable
from orchestrator.page import charts
from orchestrator.page.app import POLICY
from orchestrator.page.figures import Figures
from orchestrator.page.overview import GROUPS
from orchestrator.page.server import PasswordGate, parts
from orchestrator.page.sight import Sight
from orchestrator.page.view import Views
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.door import Door
from tests.page.browser import Site, served
from tests.page.gates import OpenGate
from tests.page.paper_world import NAMESPACES, PaperWorld

HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror=hacked=2>\"' onmouseover='x' {{ 7*7 }} &lt; \u202egnp\x1b[2J"
)
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
MOST_MS = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PaperWorld:
    return PaperWorld(tmp_path_factory.mktemp("page"), jobs=230, cards=24)


@pytest.fixture(scope="module")
def site(world: PaperWorld) -> Iterator[Site]:
    made = parts(OpenGate(), world.connection, world.settings, None)
    views = Views(world.connection, world.settings.policy(), 3600.0)  # of one moment, so that answers can be compared
    with served(world, made=replace(made, views=views)) as site:
        yield site


def test_a_thousand_jobs_and_a_hundred_cards_are_shown_in_time(tmp_path: Path) -> None:
    found = measure(PaperWorld(tmp_path, jobs=1000, cards=100), repetitions=3)
    assert (found["jobs"], found["cards"]) == (1000, 100)
    slow = {name: ms for name, ms in found.items() if name in ("overview_ms", "overview_read_anew_ms", "job_ms")}
    assert len(slow) == 3
    assert all(isinstance(ms, float) and ms <= MOST_MS for ms in slow.values()), slow


def test_every_job_is_on_one_of_the_pages_and_filters_keep_what_they_say(site: Site, world: PaperWorld) -> None:
    jobs = world.store.list_jobs()
    seen: list[str] = []
    for number in (1, 2, 3):
        page = site.get(f"/?page={number}").page
        seen += [
            found.text for found in page.all("a") if (found.attributes["href"] or "").startswith("jobs/") and found.text
        ]
    assert sorted(seen) == sorted(job.key for job in jobs)
    wanted = {job.key for job in jobs if job.metadata.namespace == "team-b" and job.spec.queue == "queue-3"}
    assert wanted
    page = site.get("/?namespace=team-b&queue=queue-3").page
    assert {row.text for row in page.all("a") if "/" in row.text} == wanted
    counts = [int(each.text.split()[0]) for each in page.all("a") if "state=" in (each.attributes["href"] or "")]
    assert sum(counts) == len(jobs), "each of the groups is counted"
    for group in GROUPS:
        assert site.get(f"/?state={group}").status == 200
    assert "No job is here" in site.get("/?namespace=nobody").body
    assert "page 3 of 3" in site.get("/?page=99999").body
    assert "page 1 of 3" in site.get("/?page=-1").body


def test_cards_are_as_full_as_the_objects_say_and_lead_to_their_jobs(site: Site, world: PaperWorld) -> None:
    page = site.get().page
    holders = [job for job in world.store.list_jobs() if job.status.active_attempt]
    cells = [found for found in page.all("a") if "% of the memory" in (found.attributes.get("title") or "")]
    assert sorted(cell.attributes["href"] or "" for cell in cells) == sorted(f"jobs/{job.key}" for job in holders)
    assert page.text.count("6 of 6 in use") == 4


def test_a_job_that_waits_says_why_by_the_code_that_decides_and_when(site: Site) -> None:
    view = site.parts.views.current()
    job = next(job for job in view.snapshot.jobs if job.status.conditions and not job.status.finish_time)
    wait_for_outlook(site)
    told = site.get(f"/jobs/{job.key}").page.text
    sentences = explain(site.parts.views.current().snapshot, job.key)
    kept = [each for each in sentences if "expected" not in each]
    assert len(kept) > 3
    assert all(sentence in told for sentence in kept)
    assert re.search(r"number \d+", told)


def test_a_job_that_trains_shows_figures_attempts_and_memory_though_mlflow_is_unknown(site: Site) -> None:
    answer = site.get("/jobs/team-a/job-0")
    text = answer.page.text
    assert "2.5000, held out 2.2500" in text
    assert "812 tokens/s" in text
    assert re.search(r"GiB predicted, .* measured \(-0\.\d %\)", text)
    assert [found.text for found in answer.page.all("title")][1:] == [
        "prepare 1: 1m40s, Prepared",
        next(found.text for found in answer.page.all("title") if found.text.startswith("train 2 on 24Gi: 33m")),
    ]
    assert "set MLFLOW_TRACKING_URI" in text


def test_what_users_write_is_text_and_nothing_else(tmp_path: Path) -> None:
    world = PaperWorld(tmp_path)
    status = world.training("24Gi", 7)
    attempts = tuple(a.model_copy(update={"message": HOSTILE, "node": HOSTILE[:100]}) for a in status.attempts)
    assert status.prepared is not None
    prepared = status.prepared.model_copy(update={"warnings": (HOSTILE,)})
    world.put(
        submitted("hostile"), status.model_copy(update={"summary": HOSTILE, "attempts": attempts, "prepared": prepared})
    )
    failed = world.finished(Reason.USER_ERROR).model_copy(update={"summary": HOSTILE})
    world.put(submitted("failed"), failed)
    table = Table(columns=("prompt", HOSTILE), rows=((HOSTILE, HOSTILE),))
    run = RunFigures(last={f"eval/{HOSTILE}": 1.0}, scores=table, answers=table, curves={"train/loss": ((1, 2.0),)})
    figures = Figures(lambda job, run_id: run, every_seconds=1, timeout_seconds=5, kept=2)
    made = replace(parts(OpenGate(), world.connection, world.settings, None), figures=figures)
    with served(world, made=made) as site:
        for path in ("/", "/jobs/team-a/hostile", "/jobs/team-a/failed", "/?namespace=" + "%3Cscript%3E%22"):
            page = site.get(path).page
            assert not [found for found in page.elements if found.tag in ("img", "iframe", "object", "style", "base")]
            assert [found.attributes for found in page.all("script")] == [
                {"src": f"{'../../' if '/jobs' in path else './'}static/page.js", "defer": None}
            ]
            for found in page.elements:
                harmful = [name for name in found.attributes if name.startswith("on") or name == "style"]
                assert not harmful, (path, found)
            assert "\u202e" not in page.text
            assert "\x1b" not in page.text
        assert site.get("/jobs/team-a/hostile").page.text.count(SHOWN) >= 8
        assert SHOWN in site.get("/jobs/team-a/failed").page.text
        assert SHOWN in site.get("/?namespace=team-a").page.text


def submitted(name: str) -> QLoRAJob:
    from tests.builders import submitted_job

    return submitted_job(name)


def test_it_only_shows(site: Site, world: PaperWorld) -> None:
    before = world.settings.database.read_bytes()
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        answer = site.get("/jobs/team-a/job-0", method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    head = site.get("/", "HEAD")
    assert (head.status, head.body) == (200, "")
    assert int(head.headers["content-length"]) > 10_000
    assert world.settings.database.read_bytes() == before


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/jobs/team-a/job-0", 200),
        ("/static/page.js", 200),
        ("/static/page.css", 200),
        ("/jobs/team-a/none", 404),
        ("/nothing", 404),
        ("/static/../app.py", 404),
        ("/static/%2e%2e/app.py", 404),
        ("/?queue=" + "q" * 4000, 414),
    ],
)
def test_every_answer_keeps_scripts_of_others_out(site: Site, path: str, status: int) -> None:
    answer = site.get(path)
    assert answer.status == status
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


def test_who_has_no_password_sees_nothing_and_is_told_where_it_is(world: PaperWorld) -> None:
    with served(world) as placeholder:
        port = placeholder.port
    door = Door("qlora page", port)
    with served(world, PasswordGate(door)) as site:
        door = Door("qlora page", site.port, door.password)
        made = replace(site.parts, gate=PasswordGate(door))
    with served(world, made=made) as site:
        host = f"127.0.0.1:{door.port}"
        for path in ("/", "/jobs/team-a/job-0", "/static/page.js"):
            answer = site.get(path, Host=host)
            assert answer.status == 401
            assert answer.body == "the password is in the address that `qlora page` printed\n"
            assert "Basic" in answer.headers["www-authenticate"]
        assert site.get(password=door.password, Host=host).status == 200
        assert site.get(password=door.password + "x", Host=host).status == 401
        assert site.get(password=door.password, Host="rebound.example:80").status == 403
        assert site.get(password=door.password, Host=host, Origin="http://elsewhere.example").status == 403


def test_many_who_look_are_one_who_reads(world: PaperWorld) -> None:
    reads: list[float] = []

    def gpu_classes() -> object:
        reads.append(time.monotonic())
        return world.classes

    connection = replace(world.connection, gpu_classes=gpu_classes)
    made = parts(OpenGate(), connection, world.settings, None)
    with served(world, made=made) as site:
        until = time.monotonic() + 2.5
        answers: list[int] = []

        def look() -> None:
            while time.monotonic() < until:
                answers.append(site.get("/static/page.css").status)
                answers.append(site.get("/jobs/team-a/job-0").status)

        lookers = [threading.Thread(target=look) for _ in range(8)]
        for looker in lookers:
            looker.start()
        for looker in lookers:
            looker.join()
    assert set(answers) == {200}
    assert len(answers) > 8
    assert 1 <= len(reads) <= 4
    assert all(later - earlier >= world.settings.page_read_seconds - 0.01 for earlier, later in pairwise(reads))


def test_an_mlflow_that_hangs_holds_no_page_up_and_comes_late(world: PaperWorld) -> None:
    answers = threading.Event()

    def read(job: QLoRAJob, run_id: str) -> RunFigures:
        answers.wait(30)
        return RunFigures(curves={"train/loss": ((1, 4.0), (2, 3.0))}, last={"eval/loss": 1.25})

    figures = Figures(read, every_seconds=0.1, timeout_seconds=0.2, kept=4)
    made = replace(parts(OpenGate(), world.connection, world.settings, None), figures=figures)
    with served(world, made=made) as site:
        began = time.monotonic()
        text = site.get("/jobs/team-a/job-0").page.text
        assert time.monotonic() - began < 10
        assert "MLflow has not answered within 0.2 s." in text
        assert "812 tokens/s" in text
        answers.set()
        time.sleep(0.3)
        answer = site.get("/jobs/team-a/job-0")
        assert "has not answered" not in answer.body
        assert "loss: training from 4 at step 1" in answer.body.lower()


def test_an_mlflow_that_refuses_is_quoted(world: PaperWorld) -> None:
    def read(job: QLoRAJob, run_id: str) -> RunFigures:
        raise TrackingUnavailable("MLflow at http://mlflow.example failed: <b>no</b>")

    figures = Figures(read, every_seconds=0.1, timeout_seconds=5, kept=4)
    made = replace(parts(OpenGate(), world.connection, world.settings, None), figures=figures)
    with served(world, made=made) as site:
        assert "MLflow at http://mlflow.example failed: <b>no</b>." in site.get("/jobs/team-a/job-0").page.text


def test_who_may_see_one_namespace_learns_nothing_of_others(world: PaperWorld) -> None:
    gate = OpenGate(Sight(namespaces=frozenset({"team-c"}), queues=False))
    with served(world, gate) as site:
        for path in ("/", "/?namespace=team-a", "/jobs/team-c/job-2", "/jobs/team-c/job-34"):
            answer = site.get(path)
            assert answer.status == 200
            others = [name for name in NAMESPACES if name != "team-c"]
            shown = answer.page.text
            assert not [name for name in others if name in shown.replace("No job is here", "")], path
        assert "Cards are not this account's to read." in site.get().body.replace("&#39;", "'")
        assert site.get("/jobs/team-a/job-0").status == 404
        assert site.get("/jobs/team-a/job-0").body == site.get("/jobs/team-a/none").body


def test_an_account_without_rights_beyond_its_namespace_sees_that(world: PaperWorld) -> None:
    class OwnNamespace(type(world.store)):
        """As an API server answers it."""

        def list_jobs(self, namespace: str | None = None) -> object:
            if namespace is None:
                raise Forbidden("jobs of all namespaces are not this account's to list")
            return super().list_jobs(namespace)

        def list_queues(self) -> object:
            raise Forbidden("queues are not this account's to list")

    def no_cards() -> object:
        raise Forbidden("nodes are not this account's to list")

    connection = Connection(
        store=OwnNamespace(world.settings),
        is_running=lambda: False,
        gpu_classes=no_cards,
        logs=world.connection.logs,
        namespace="team-b",
    )
    with served(world, made=parts(OpenGate(), connection, world.settings, None)) as site:
        text = site.get().page.text
        assert "team-b/job-1" in text
        assert "team-a/" not in text
        assert "Queues are not this account's to read." in text
        assert "The service is not running" in text
        assert "This is what the controller has put on record" in site.get("/jobs/team-b/job-1").page.text


def test_a_store_that_is_away_leaves_the_last_look_and_says_so(world: PaperWorld) -> None:
    away = threading.Event()

    def gpu_classes() -> object:
        if away.is_set():
            raise StoreUnavailable("the object database did not answer")
        return world.classes

    connection = replace(world.connection, gpu_classes=gpu_classes)
    made = parts(OpenGate(), connection, world.settings, None)
    made = replace(made, views=Views(connection, world.settings.policy(), 0.01, rest=0))
    with served(world, made=made) as site:
        assert "did not answer" not in site.get().body
        away.set()
        time.sleep(0.05)
        answer = site.get()
        assert answer.status == 200
        assert re.search(r"This is how it was at [\d:]{8} UTC: the object database did not answer", answer.page.text)
    away.set()
    with served(world, made=replace(made, views=Views(connection, world.settings.policy(), 1))) as site:
        answer = site.get()
        assert answer.status == 503
        assert "the object database did not answer." in answer.page.text


def test_the_command_tells_its_address_and_ends_with_a_signal(world: PaperWorld) -> None:
    environment = {**os.environ, **world.settings.environment(), "QLORA_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "orchestrator.cli", "page", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as page:
        assert page.stdout is not None
        found = re.fullmatch(r"http://qlora:(\S+)@127\.0\.0\.1:(\d+)\n", page.stdout.readline())
        assert found
        site = Site(int(found[2]), parts(OpenGate(), world.connection, world.settings, None))
        assert site.get().status == 401
        assert "team-a/job-0" in site.get(password=found[1]).body
        page.send_signal(signal.SIGTERM)
        assert page.wait(60) == 0


def test_a_port_that_is_taken_is_said(world: PaperWorld) -> None:
    with served(world) as site:
        command = [sys.executable, "-m", "orchestrator.cli", "page", "--port", str(site.port)]
        environment = {**os.environ, **world.settings.environment()}
        ended = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"error: port {site.port} cannot be used: Address already in use; name another one: --port\n"


@pytest.mark.parametrize(
    "values", [[], [5.0], [0.0] * 900, [1e-9, 2e-9], [1e12, -1e12, 3.0], [float("nan"), 1.0], [1e308]]
)
def test_curves_stay_in_their_picture_and_within_bounds(values: list[float]) -> None:
    drawn = charts.chart("x", (("a", "first", list(enumerate(values))),), level=("expected", 4.0))
    assert (drawn is None) == (not [value for value in values if abs(value) < 1e300])
    if drawn is None:
        return
    for line in drawn.lines:
        places = [tuple(map(float, place.split(","))) for place in line.path.split()]
        assert 1 <= len(places) <= charts.MOST_POINTS
        assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in places)
    assert drawn.level is not None
    assert 0 <= drawn.level.at <= charts.HEIGHT
    assert 2 <= len(drawn.y_marks) <= 8


def test_a_peak_of_memory_is_seen_among_thousands_of_steps() -> None:
    points = [(float(step), 99.0 if step == 777 else 1.0) for step in range(5000)]
    highest, mean = (charts.chart("x", (("a", "first", points),), kept=kept) for kept in (max, fmean))
    assert highest is not None
    assert mean is not None
    top = [
        min(float(y) for _, y in (place.split(",") for place in each.lines[0].path.split())) for each in (highest, mean)
    ]
    assert top[0] == highest.y_marks[-1].at == charts.TOP or top[0] < top[1]


def wait_for_outlook(site: Site) -> None:
    for _ in range(600):
        if site.parts.outlook.latest(site.parts.views.current().snapshot) is not None:
            return
        time.sleep(0.05)
    raise AssertionError("nothing was worked out")
