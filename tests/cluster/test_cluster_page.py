"""The page's program on a real API server, under the account that the chart gives it: who sees what, and at what cost.

Visitors are service accounts with the chart's roles for people, and show real tokens. The program asks through a proxy,
which counts what it asks for and can be told to fail.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from socket import create_connection, create_server
from urllib.parse import quote

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi, Timeouts, path_of
from orchestrator.adapters.kubernetes.reviews import Reviews
from orchestrator.adapters.kubernetes.settings import ClusterSettings
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.page.app import Refused
from orchestrator.page.sight import Sight
from orchestrator.page.token_gate import AWAY, BUSY, NOBODYS, SAVED_SECONDS, TokenGate
from tests.builders import ON_THE_HUB, make_queue, submitted_job
from tests.cluster.accounts import RBAC, ROLE, account, binding, chart_parts, create, kubeconfig_of, token_of
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controller_program import PAGE, SETTINGS, Program
from tests.cluster.fault_proxy import Faults, Proxy, fault_proxy
from tests.cluster.resources import add_gpu_node, clear_all, require
from tests.deploy.render import NAMESPACE, documents
from tests.page.browser import Answer, ask

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # of the proxy, which outlives a test
REVIEW_SECONDS = 2.0
WAIT_SECONDS = 60.0
RATE = 5.0
BURST = RATE * SAVED_SECONDS
VALUES = "page.enabled=true,jobs.namespaces={team-a,team-b}"
VISITORS = ("sees-a", "sees-all", "sees-none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The page that is served, who may look, and through what it asks."""

    program: Program
    proxy: Proxy
    tokens: Mapping[str, str]

    def get(self, visitor: str = "", path: str = "/", **headers: str) -> Answer:
        """What a program of the visitor's is answered."""
        shown = {"Authorization": f"Bearer {self.tokens[visitor]}"} if visitor else {}
        return ask(self.program.page_port, path, "GET", {**shown, **headers})

    def post(self, path: str, token: str = "", scheme: str = "http", **headers: str) -> Answer:
        """A form, sent by the page itself unless headers say something else."""
        own = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "text/html"}
        own |= {"Origin": f"{scheme}://127.0.0.1:{self.program.page_port}"}
        return ask(self.program.page_port, path, "POST", {**own, **headers}, f"token={quote(token)}")


@pytest.fixture(scope="module")
def site(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two jobs of two namespaces, a queue and a card; the API server comes after the page."""
    require("helm")
    api, folder = cluster.api(), tmp_path_factory.mktemp("page")
    clear_all(api)
    made = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}]
    made += documents(chart_parts("rbac/users", values=VALUES) + chart_parts("rbac/page", values=VALUES))
    made += [d for d in documents(chart_parts("page/workload", values=VALUES)) if d["kind"] == "ServiceAccount"]
    made += [account(name) for name in VISITORS]
    made += [
        binding("RoleBinding", "sees-a", f"{ROLE}-viewer"),
        binding("ClusterRoleBinding", "sees-all", f"{ROLE}-queue-admin"),
    ]
    for document in made:
        create(api, document)
    store = KubernetesStore(api)
    for name, namespace in (("shown", "team-a"), ("hidden", "team-b")):
        store.create_job(submitted_job(name, namespace, **ON_THE_HUB))
    store.apply_queue(make_queue("research"))
    add_gpu_node(api, "gpu-1", 24_564)
    tokens = {**{name: token_of(cluster, name) for name in VISITORS}, "admin": cluster.token}
    with fault_proxy(cluster.url, Faults(errors=1.0)) as proxy:
        program = Program(
            kubeconfig_of(cluster, "page", proxy.url),
            folder,
            {
                "QLORA_WATCH_NAMESPACES": "team-a,team-b",
                "QLORA_PAGE_REVIEW_SECONDS": str(REVIEW_SECONDS),
                "QLORA_PAGE_STRANGERS_PER_SECOND": str(RATE),
                "QLORA_TRACKING_URI": "http://127.0.0.1:9",
                "QLORA_GPU_CLASS_DEFINITIONS": '{"23Gi": {"usableMiB": 22016, "cards": ["NVIDIA-L4"]}}',
                "QLORA_GPU_CLASSES": "23Gi=1",
            },
            name=PAGE,
        )
        program.keep_running()
        try:
            yield Site(program=program, proxy=proxy, tokens=tokens)
        finally:
            program.kill()
    clear_all(api)


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def listens(port: int) -> bool:
    try:
        with create_connection(("127.0.0.1", port), timeout=5):
            return True
    except OSError:
        return False


def settled(site: Site) -> None:
    """The API server answers, and the page has noticed."""
    site.proxy.faults = Faults()
    until(lambda: site.get("admin").status == 200, site.program.log.read_text())


def test_an_api_server_that_is_away_from_the_start_is_said_and_waited_for(site: Site) -> None:
    until(lambda: listens(site.program.page_port), "the page does not listen")
    told = site.get("admin", Accept="text/html")
    assert told.status == 503
    assert "The API server cannot be asked what your account may see" in told.page.text
    assert [each.attributes["data-refresh"] for each in told.page.all("body")] == ["5"], "it looks again by itself"
    assert ask(site.program.health_port, "/healthz").status == 200
    assert ask(site.program.health_port, "/readyz").status == 503
    settled(site)
    until(lambda: ask(site.program.health_port, "/readyz").status == 200, "it is not ready")


def test_each_visitor_sees_what_the_own_account_may_list(site: Site) -> None:
    settled(site)
    seen = {name: site.get(name).page.text for name in (*VISITORS, "admin")}
    shown = {
        what: {name for name, text in seen.items() if told in text}
        for what, told in {
            "a's job": "team-a/shown",
            "b's job": "team-b/hidden",
            "a queue": "research",
            "a card": "0 of 1 in use",
            "a card of a defined class": "23Gi",
            "no queues": "Queues are not this account",
            "no cards": "Cards are not this account",
        }.items()
    }
    assert shown == {
        "a's job": {"sees-a", "sees-all", "admin"},
        "b's job": {"sees-all", "admin"},
        "a queue": {"sees-all", "admin"},
        "a card": {"admin"},
        "a card of a defined class": {"admin"},
        "no queues": {"sees-a", "sees-none"},
        "no cards": {"sees-a", "sees-all", "sees-none"},
    }
    assert "team-b" not in seen["sees-a"] + seen["sees-none"]
    assert [site.get(name, "/jobs/team-b/hidden").status for name in seen] == [404, 200, 404, 200]
    other, none = (site.get("sees-a", f"/jobs/team-b/{name}").body for name in ("hidden", "none"))
    assert other == none, "nor does anybody learn which jobs there are"


def test_who_shows_no_token_or_nobodys_is_told_so_and_sees_nothing(site: Site) -> None:
    settled(site)
    for headers in (
        {},
        {"Authorization": "Bearer nobodys"},
        {"Authorization": "Bearer not a token"},
        {"Authorization": f"Basic {site.tokens['admin']}"},
        {"Authorization": f"Bearer {'x' * 20_000}"},
        {"Cookie": "qlora-token=nobodys; other=1"},
    ):
        answer = ask(site.program.page_port, "/", "GET", headers)
        assert (answer.status, answer.headers["content-type"]) == (401, "text/plain; charset=utf-8")
        assert "Bearer" in answer.headers["www-authenticate"]
        page = ask(site.program.page_port, "/jobs/team-a/shown", "GET", {**headers, "Accept": "text/html,*/*"})
        assert page.status == 401
        [form] = page.page.all("form")
        assert (form.attributes["method"], form.attributes["action"]) == ("post", "../../login")
        assert not [name for name in ("team-a", "shown", "research") if name in page.page.text]
    assert ask(site.program.page_port, "/static/page.css").status == 200


def test_a_browser_logs_in_with_a_form_of_the_page_and_out_again(site: Site) -> None:
    settled(site)
    token = site.tokens["sees-a"]
    entered = site.post("/login", f" {token}\n")
    assert (entered.status, entered.headers["location"]) == (303, "./")
    cookie, *attributes = entered.headers["set-cookie"].split("; ")
    assert cookie == f"qlora-token={token}"
    assert attributes == ["Max-Age=28800", "Path=/", "HttpOnly", "SameSite=Strict"]
    page = site.get(Cookie=cookie)
    assert "team-a/shown" in page.page.text
    assert "team-b" not in page.page.text
    assert [form.attributes["action"] for form in page.page.all("form")][:1] == ["./logout"]
    left = site.post("/logout", Cookie=cookie)
    assert (left.status, left.headers["set-cookie"].split("; ")[:2]) == (303, ["qlora-token=", "Max-Age=0"])
    secure = site.post("/login", token, scheme="https").headers["set-cookie"]
    assert secure.startswith(f"__Host-qlora-token={token}; ")
    assert secure.endswith("; Secure")
    assert site.get(Cookie=secure.split(";")[0]).status == 200


@pytest.mark.parametrize(
    ("token", "headers", "status", "told"),
    [
        ("", {"Origin": "http://elsewhere.example"}, 403, "sent by a page of another address"),
        ("", {"Origin": "null"}, 403, "sent by a page of another address"),
        ("nobodys", {}, 401, "takes this token for nobody's"),
        ("", {}, 401, "asks for a token of your own account"),
        ("x" * 5000, {}, 422, "longer than the 3800 characters"),
        ("x" * 60_000, {}, 422, "longer than the 3800 characters"),
    ],
)
def test_a_form_that_logs_nobody_in_says_why(
    site: Site, token: str, headers: Mapping[str, str], status: int, told: str
) -> None:
    settled(site)
    answer = site.post("/login", token, **headers)
    assert answer.status == status
    assert told in answer.page.text
    assert "set-cookie" not in answer.headers
    assert answer.headers["content-security-policy"]
    assert site.post("/", token).status == 405


def test_a_right_that_is_taken_away_is_gone_from_the_page_in_time(site: Site, cluster: ControlPlane) -> None:
    settled(site)
    assert "team-a/shown" in site.get("sees-a").body
    api, path = cluster.api(), path_of(RBAC, "rolebindings", "team-a")
    api.delete(f"{path}/sees-a")
    until(lambda: "team-a/shown" not in site.get("sees-a").body, "it is still shown")
    api.create(path, binding("RoleBinding", "sees-a", f"{ROLE}-viewer"))
    until(lambda: "team-a/shown" in site.get("sees-a").body, "it is not shown again")


def test_however_many_look_the_api_server_is_asked_little(site: Site) -> None:
    settled(site)
    reads, writes, began = site.proxy.reads, site.proxy.writes, time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: site.get("sees-a").status, range(100)))
    assert set(found) == {200}
    rounds = (time.monotonic() - began) / REVIEW_SECONDS + 1
    assert site.proxy.writes - writes <= 6 * rounds, "whose it is, what it may list of four, and who else looked"
    assert site.proxy.reads - reads <= 6, "all are shown what watches have told; these list anew now and then"


def test_a_flood_of_tokens_holds_up_nobody_who_is_known_and_is_bounded(site: Site) -> None:
    settled(site)
    assert site.get("sees-a").status == 200
    writes, began = site.proxy.writes, time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        bad = pool.map(lambda n: site.get(Authorization=f"Bearer flood-{n}").status, range(150))
        known = [site.get("sees-a").status for _ in range(20)]
        answers = list(bad)
    assert set(known) == {200}
    assert set(answers) == {401, 429}
    seconds = time.monotonic() - began
    assert answers.count(401) <= BURST + RATE * seconds + 1
    assert site.proxy.writes - writes <= BURST + RATE * seconds + 1 + 6 * (seconds / REVIEW_SECONDS + 2)


def test_what_is_kept_of_visitors_is_bounded(site: Site, cluster: ControlPlane) -> None:
    settings = gate_settings(page_visitors_kept=4, page_strangers_per_second=1000)
    gate = TokenGate(Reviews(cluster.api()), settings, lambda: ("team-a", "team-b"))
    assert gate.look(site.tokens["sees-a"]) == Sight(namespaces=frozenset({"team-a"}), queues=False, cards=False)
    assert [gate.look(f"nobodys-{number}") for number in range(10)] == [NOBODYS] * 10
    for name in (*VISITORS, "admin"):
        assert isinstance(gate.look(site.tokens[name]), Sight)
    assert isinstance(gate.look(token_of(cluster, "sees-none")), Sight)
    assert gate.kept == (4, 4)


def test_more_namespaces_than_are_asked_about_are_told_and_the_own_one_comes_first(
    site: Site, cluster: ControlPlane
) -> None:
    settings = gate_settings(page_namespaces_limit=2)
    gate = TokenGate(Reviews(cluster.api()), settings, lambda: ("a", "b", "c", "team-a"))
    sight = gate.look(site.tokens["sees-a"])
    assert sight == Sight(namespaces=frozenset({"team-a"}), queues=False, cards=False, unasked=2)


def test_an_api_server_that_hangs_is_waited_for_by_one_visitor_at_a_time(cluster: ControlPlane) -> None:
    settings = gate_settings(page_review_timeout_seconds=0.3, page_strangers_per_second=1000)
    timeouts = Timeouts(connect_seconds=0.3, answer_seconds=0.3)
    with create_server(("127.0.0.1", 0)) as hangs:  # it takes connections, and says nothing
        url = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        kubeconfig = cluster.kubeconfig_for(cluster.token, url=url, name="hangs")
        gate = TokenGate(Reviews(KubeApi(kubeconfig=str(kubeconfig), timeouts=timeouts)), settings, lambda: ())
        began = time.monotonic()
        with ThreadPoolExecutor(32) as pool:
            found: list[Sight | Refused] = list(pool.map(gate.look, map("visitor-{}".format, range(64))))
        assert [each for each in found if each not in (AWAY, BUSY)] == []
        assert time.monotonic() - began < 3.0


def test_an_api_server_that_goes_away_later_is_said_and_waited_for_and_the_program_ends_when_asked(site: Site) -> None:
    settled(site)
    site.proxy.faults = Faults(errors=1.0)
    until(lambda: site.get("sees-a", Accept="text/html").status == 503, "who cannot be asked about is let in")
    settled(site)
    until(lambda: "team-a/shown" in site.get("sees-a").body, "it does not come back")
    assert site.program.process is not None
    site.program.process.send_signal(signal.SIGTERM)
    assert site.program.process.wait(30) == 0
    levels = [json.loads(line)["level"] for line in site.program.log.read_text().splitlines()]
    assert set(levels) <= {"INFO", "WARNING"}, site.program.log.read_text()


def gate_settings(**changes: object) -> ClusterSettings:
    wanted = {name.removeprefix("QLORA_").lower(): value for name, value in SETTINGS.items()}
    return ClusterSettings.model_validate({**wanted, "tracking_uri": "http://127.0.0.1:9", **changes})
