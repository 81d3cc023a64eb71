"""The page in Chromium, on a desk and on a phone, by day and by night: `make test-page`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.adapters.mlflow.run_reader import RunFigures, Table
from orchestrator.api.formats import Metric
from orchestrator.page.app import Refused
from orchestrator.page.figures import Figures
from orchestrator.page.server import PasswordGate, parts
from orchestrator.page.sight import Sight
from orchestrator.page.token_login import Cookies
from orchestrator.sdk.door import Door
from tests.page.browser import served
from tests.page.chromium import Tab, find_browser, tab
from tests.page.gates import OneToken, OpenGate
from tests.page.paper_world import PaperWorld
from tests.page.test_page import HOSTILE, submitted

pytestmark = pytest.mark.skipif(find_browser() is None, reason="Chromium is not installed; make test-page installs it")

WIDTHS = (1280, 390)
RUN = RunFigures(
    curves={
        Metric.TRAIN_LOSS: tuple((step, 3.0 / step + 1 + step % 7 / 50) for step in range(1, 900)),
        Metric.EVAL_LOSS: tuple((step, 2.8 / (step + 1) + 1.2) for step in range(0, 900, 100)),
        Metric.TOKENS_PER_SECOND: tuple((step, 800.0 + step % 13) for step in range(1, 900)),
        Metric.VRAM_ALLOCATED_BYTES: tuple((step, 1.8e10 + 1e8 * (step % 3)) for step in range(1, 900)),
    },
    last={"eval/loss": 1.2, "eval/exact_match": 0.75},
    answers=Table(columns=("prompt", "adapter"), rows=((HOSTILE, "w" * 3000), ("2 + 2 =", "4"))),
)
CONTRASTS = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(
    v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const under = e => getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)' ? under(e.parentElement) : e;
  const ratio = e => {
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(under(e)).backgroundColor].map(light);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
  return [...document.querySelectorAll('main *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
    .filter(e => !e.closest('svg') && !['OPTION', 'PROGRESS'].includes(e.tagName) && ratio(e) < 4.5)
    .map(e => `${e.tagName}.${e.className} ${ratio(e)}`);
})()"""
"""Text that is not told from what is under it as well as WCAG 2.2 asks (1.4.3)."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PaperWorld:
    world = PaperWorld(tmp_path_factory.mktemp("page"), jobs=230, cards=100)
    status = world.training("24Gi", 90)
    world.put(submitted("hostile"), status.model_copy(update={"summary": HOSTILE}))
    return world


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def address(world: PaperWorld) -> Iterator[str]:
    """As the command prints it, with the password."""
    settings = world.settings.model_copy(update={"page_refresh_seconds": 1.0})
    figures = Figures(lambda job, run_id: RUN, every_seconds=1, timeout_seconds=5, kept=4)
    made = replace(parts(OpenGate(), world.connection, settings, None), figures=figures)
    gate = LateGate()
    with served(world, made=replace(made, gate=gate)) as site:
        gate.inner = PasswordGate(Door("qlora page", site.port))
        yield gate.inner.door.url


class LateGate:
    """The gate of a port that is not known before it is listened to."""

    inner: PasswordGate

    def admit(self, headers: Mapping[str, str]) -> Sight | Refused:
        return self.inner.admit(headers)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", ["/", "/?state=waiting", "/jobs/team-a/job-0", "/jobs/team-a/hostile"])
def test_a_page_fits_its_screen_reads_well_and_has_no_fault(
    browser: Tab, address: str, tmp_path: Path, path: str, width: int, scheme: str
) -> None:
    browser.faults.clear()
    browser.show(address + path, width, scheme)
    browser.picture(Path(os.environ.get("QLORA_PICTURES", tmp_path)) / f"{scheme}-{width}{path.replace('/', '-')}.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.styleSheets[0].cssRules.length") > 20
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate("document.querySelectorAll('main h1').length") == 1
    assert browser.evaluate(CONTRASTS) == []
    assert browser.faults == []


def test_an_open_page_shows_what_is_new_by_itself_and_stays_where_it_was(
    browser: Tab, address: str, world: PaperWorld
) -> None:
    browser.faults.clear()
    browser.show(f"{address}/jobs/team-a/job-0", 390)
    browser.evaluate("window.scrollTo(0, 300); window.stays = true")
    job = world.store.get_job("team-a", "job-0")
    world.put(submitted("job-0"), job.status.model_copy(update={"summary": "told anew", "progress": None}))
    browser.wait_for("!document.querySelector('main').innerText.includes('812 tokens/s')")
    assert browser.evaluate("[window.stays, window.scrollY]") == [True, 300]
    assert browser.faults == []


def test_filters_are_kept_in_the_address(browser: Tab, address: str) -> None:
    browser.faults.clear()
    browser.show(address, 390)
    browser.evaluate(
        "document.querySelector('[name=namespace]').value = 'team-b', document.querySelector('form').submit()"
    )
    browser.wait_for("location.search.includes('namespace=team-b') && document.readyState === 'complete'")
    names = browser.evaluate(
        "[...document.querySelectorAll('tbody a')].map(a => a.innerText).filter(t => t.includes('/'))"
    )
    assert names
    assert all(name.startswith("team-b/") for name in names)
    assert browser.faults == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_visitor_of_a_cluster_logs_in_with_a_token_and_out_again(browser: Tab, world: PaperWorld, width: int) -> None:
    browser.faults.clear()
    made = parts(OneToken("good"), world.connection, world.settings, None)
    with served(world, made=replace(made, cookies=Cookies(3600))) as site:
        browser.show(f"http://127.0.0.1:{site.port}/jobs/team-a/job-0", width)
        for token, then in (("false", "'Log in'"), ("good", "'Jobs, queues and cards'")):
            assert browser.evaluate("document.querySelector('h1').textContent") == "Log in"
            assert browser.evaluate(CONTRASTS) == []
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            browser.evaluate(f"window.before = 1, document.querySelector('input').value = '{token}'")
            browser.evaluate("document.querySelector('main form').requestSubmit()")
            browser.wait_for(f"!window.before && document.querySelector('h1')?.textContent === {then}")
            browser.wait_for("document.readyState === 'complete'")
        assert browser.evaluate("document.cookie") == "", "no script reads it"
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [each for each in browser.faults if "401" not in each] == []
        browser.evaluate("document.querySelector('header form').requestSubmit()")
        browser.wait_for("document.querySelector('h1')?.textContent === 'Log in'")
