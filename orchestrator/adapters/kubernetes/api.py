"""The Kubernetes API as raw JSON: transport, authentication, and errors in the service's own tree.

The only file that imports `kubernetes`, of which it takes what users expect to work: kubeconfig with its plugins,
in-cluster tokens that rotate, proxies, certificates. Objects stay dictionaries: generated models would cost more time
and memory than the rest of the controller.

Every call is bounded in time. Errors: 404 NotFound, 409 Conflict (AlreadyExists for a creation), 410 Gone, 400 and 422
InvalidObject, 403 Forbidden; 5xx and a connection that fails StoreUnavailable. A 429 was not carried out, so the call
is made again after the time that the server asks for, THROTTLED_TRIES times at most. Nor was a 401, which says that a
token has expired or was rotated: it is read anew, and where that does not help, the server counts as unavailable.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import client as kubernetes_client  # pyright: ignore[reportMissingTypeStubs]  untyped upstream
from kubernetes import config as kubernetes_config  # pyright: ignore[reportMissingTypeStubs]

from orchestrator.api.words import on_one_line
from orchestrator.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    InvalidObject,
    NotFound,
    PermanentError,
    StoreUnavailable,
    TransientError,
)

Json = dict[str, Any]  # Any: an object of the API, as it comes
Query = Mapping[str, str | int]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
IN_CLUSTER = "in-cluster"
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
USER_AGENT = "qlora-orchestrator"
CONNECTIONS = 64
"""Open connections kept for reuse; more are opened and closed when needed."""
THROTTLED_TRIES = 4
THROTTLED_SECONDS = 1.0
"""Wait after a 429 that names no time; no wait is longer than THROTTLED_MAX_SECONDS."""
THROTTLED_MAX_SECONDS = 10.0
STREAM_BYTES = 1 << 16
READS = ("GET", "WATCH")


class Gone(TransientError):
    """The server has forgotten the version that a watch wanted to go on from: list again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Bounds on one request."""

    connect_seconds: float = 5.0
    answer_seconds: float = 30.0


class RateLimiter:
    """So many requests a second about each kind of object in the long run, and so many at once after a pause.

    Each kind by itself, as the clients of controllers in Go have it. Safe to share between threads.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """0 a second is no bound."""
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}
        """How many may be made at once, and when that was so, by kind."""

    def seconds_to_wait(self, kind: str) -> float:
        """Until the next request may be made, which is counted with this."""
        if not self._per_second:
            return 0.0
        with self._lock:
            now = self._clock()
            left, counted_at = self._left.get(kind, (float(self._burst), now))
            left = min(self._burst, left + (now - counted_at) * self._per_second) - 1
            self._left[kind] = left, now
            return max(0.0, -left / self._per_second)


NO_BOUND = RateLimiter(0, 1)


class KubeApi:
    """A connection to one API server; safe to share between threads."""

    def __init__(
        self,
        context: str = "",
        *,
        kubeconfig: str = "",
        timeouts: Timeouts | None = None,
        limiter: RateLimiter = NO_BOUND,
    ) -> None:
        """Connects to a kubeconfig context, the current one by default; `in-cluster` is the pod's own service account.

        The kubeconfig is the one that `KUBECONFIG` names unless another is given. The limiter says when to ask.
        """
        untyped: Any = kubernetes_client  # Any: the library has no types
        configuration: Any = untyped.Configuration()
        configuration.connection_pool_maxsize = CONNECTIONS
        self._credentials = context, kubeconfig or os.environ.get("KUBECONFIG", "")
        self.namespace = _load(configuration, *self._credentials)
        """The namespace that the context names."""
        self._client: Any = untyped.ApiClient(configuration)
        self._host: str = configuration.host
        self._timeouts = timeouts or Timeouts()
        self._limiter = limiter
        self._lock = threading.Lock()
        self.requests: Counter[tuple[str, str]] = Counter()
        """Requests made, by verb and resource."""
        self.before_write: Callable[[], None] = lambda: None
        """Called before every request that changes something; whoever must not write any more raises or ends here."""

    def get(self, path: str, **query: str | int) -> Json:
        """One object, or a list."""
        return self._json("GET", path, query)

    def get_as(self, path: str, accept: str) -> Json:
        """The same in another form, such as the table that kubectl prints."""
        answer = self._send("GET", path, {}, None, "", self._timeouts.answer_seconds, accept)
        return cast(Json, json.loads(answer.data))

    def text(self, path: str, **query: str | int) -> str:
        """What is no object, such as a log."""
        answer = self._send("GET", path, query, None, "", self._timeouts.answer_seconds)
        return answer.data.decode(errors="replace")

    def create(self, path: str, body: Json) -> Json:
        """A new object in the collection `path`."""
        return self._json("POST", path, {}, body)

    def rehearse(self, path: str, body: Json) -> Json:
        """The object as `create` would store it, under another name; nothing is stored."""
        meta: Json = body["metadata"]
        unnamed = {**{key: value for key, value in meta.items() if key != "name"}, "generateName": f"{meta['name']}-"}
        return self._json("POST", path, {"dryRun": "All"}, {**body, "metadata": unnamed})

    def replace(self, path: str, body: Json) -> Json:
        """PUT; with `metadata.resourceVersion` only if the object is still at it."""
        return self._json("PUT", path, {}, body)

    def patch(self, path: str, body: object, kind: str = MERGE_PATCH) -> Json:
        """PATCH of a kind."""
        return self._json("PATCH", path, {}, body, kind)

    def delete(self, path: str, options: Json | None = None) -> Json:
        """DELETE: the object while something holds it, or a Status when it is gone."""
        return self._json("DELETE", path, {}, options)

    def watch(self, path: str, silence_seconds: float, **query: str | int) -> Stream:
        """Events from now on, or from `resourceVersion` on; a server that is silent for longer counts as gone."""
        return Stream(self._send("WATCH", path, {**query, "watch": "true"}, None, "", silence_seconds), path)

    def close(self) -> None:
        """Hang up."""
        self._client.rest_client.pool_manager.clear()

    def _json(self, verb: str, path: str, query: Query, body: object = None, kind: str = JSON) -> Json:
        response = self._send(verb, path, query, body, kind, self._timeouts.answer_seconds)
        return cast(Json, json.loads(response.data))

    def _send(
        self, verb: str, path: str, query: Query, body: object, kind: str, answer_seconds: float, accept: str = JSON
    ) -> urllib3.BaseHTTPResponse:
        """The answer to one request; raises for one that is an error."""
        data = None if body is None else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        url = f"{self._host}{path}" + (f"?{urlencode(query)}" if query else "")
        response = self._request(verb, url, path, data, kind, answer_seconds, accept)
        for _ in range(THROTTLED_TRIES - 1):
            if response.status != 429:
                break
            response.drain_conn()
            time.sleep(_asked_seconds(response))
            response = self._request(verb, url, path, data, kind, answer_seconds, accept)
        if response.status == 401:
            response.drain_conn()
            self._renew_credentials()
            response = self._request(verb, url, path, data, kind, answer_seconds, accept)
        if response.status >= 400:
            raise_error(response.status, _status(response.data), f"{verb} {path}", creates=verb == "POST")
        return response

    def _renew_credentials(self) -> None:
        """Read the token anew from where it comes from."""
        untyped: Any = kubernetes_client  # Any: the library has no types
        fresh: Any = untyped.Configuration()
        _load(fresh, *self._credentials)
        known: Any = self._client.configuration
        known.api_key, known.refresh_api_key_hook = fresh.api_key, fresh.refresh_api_key_hook

    def _request(
        self, verb: str, url: str, path: str, data: bytes | None, kind: str, answer_seconds: float, accept: str
    ) -> urllib3.BaseHTTPResponse:
        resource = resource_of(path)
        time.sleep(self._limiter.seconds_to_wait(resource.partition("/")[0]))
        if verb not in READS:
            self.before_write()
        with self._lock:
            self.requests[verb, resource] += 1
        headers = {"Accept": accept, "User-Agent": USER_AGENT}
        if data is not None:
            headers["Content-Type"] = kind
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, verb, None)
        try:
            return self._client.rest_client.pool_manager.request(
                "GET" if verb == "WATCH" else verb,
                url,
                body=data,
                headers=headers,
                timeout=urllib3.Timeout(connect=self._timeouts.connect_seconds, read=answer_seconds),
                retries=False,  # whoever calls knows whether the same call may be made again
                preload_content=verb != "WATCH",
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise StoreUnavailable(f"the API server {self._host} did not answer {verb} {path}: {error}") from error


class Stream:
    """The events of one watch, as they come. Another thread may close it, which ends the iteration."""

    def __init__(self, response: urllib3.BaseHTTPResponse, path: str) -> None:
        self._response: Any = response  # Any: `shutdown` is not in the library's base type
        self._path = path
        self._closed = False

    def __iter__(self) -> Iterator[Json]:
        """Until the server ends the stream; raises Gone, StoreUnavailable."""
        try:
            for line in self._lines():
                event = cast(Json, json.loads(line))
                if event["type"] == "ERROR":
                    status: Json = event["object"]
                    raise_error(int(status.get("code", 500)), status, f"watch {self._path}")
                yield event
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if not self._closed:
                raise StoreUnavailable(f"the watch of {self._path} broke off: {error}") from error
        finally:
            self._response.close()  # the rest of the stream is not wanted, so the connection cannot be kept

    def close(self) -> None:
        """Wake whoever reads, and end it."""
        self._closed = True
        try:
            self._response.shutdown()
        except (ValueError, RuntimeError, OSError):  # it has ended already
            self._response.close()

    def _lines(self) -> Iterator[bytes]:
        """Complete lines of a chunked stream, each as soon as it is there."""
        rest = b""
        for piece in self._response.stream(amt=STREAM_BYTES):
            *complete, rest = (rest + piece).split(b"\n")
            yield from complete


def path_of(group_version: str, resource: str, namespace: str = "", name: str = "") -> str:
    """The path of a collection or an object: `v1` is the core group, no namespace is all of them."""
    root = f"/api/{group_version}" if "/" not in group_version else f"/apis/{group_version}"
    within = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{root}{within}/{resource}" + (f"/{quote(name)}" if name else "")


def resource_of(path: str) -> str:
    """The resource that a path is about, `pods` or `qlorajobs/status`: a label of bounded cardinality."""
    parts = path.partition("?")[0].split("/")[3 if path.startswith("/api/") else 4 :] or [path]  # such as /version
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        parts = parts[2:]
    return "/".join((parts[0], parts[2])) if len(parts) > 2 else parts[0]


def raise_error(code: int, status: Json, what: str, *, creates: bool = False) -> NoReturn:
    """The error of the service's own tree that stands for an answer of the server."""
    message = f"{what}: {status.get('message') or f'the API server answered {code}'}"
    if code == 409 and creates:
        raise AlreadyExists(message)
    if code == 401:
        raise StoreUnavailable(f"{message}; the credentials have expired or are not known there")
    if code == 429 or code >= 500:
        raise StoreUnavailable(message)
    raise _ERRORS.get(code, PermanentError)(message)


_ERRORS: Mapping[int, type[PermanentError] | type[TransientError]] = {
    400: InvalidObject,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: InvalidObject,
}


def _load(configuration: Any, context: str, kubeconfig: str) -> str:
    """Fill the configuration from where the context says; its namespace."""
    untyped: Any = kubernetes_config  # Any: the library has no types
    try:
        if context == IN_CLUSTER:
            untyped.load_incluster_config(client_configuration=configuration)
            return Path(NAMESPACE_FILE).read_text(encoding="utf-8").strip()
        file = kubeconfig or None  # the library reads the variable only once, when it is imported
        untyped.load_kube_config(file, context=context or None, client_configuration=configuration)
        contexts, current = untyped.list_kube_config_contexts(file)
        chosen = next((known for known in contexts if known["name"] == context), current)
        return str(chosen["context"].get("namespace") or "default")
    except Exception as error:
        told = on_one_line(str(error))
        raise InvalidObject(f"no way to a cluster: {told}; check KUBECONFIG and the context's name") from error


def _asked_seconds(response: urllib3.BaseHTTPResponse) -> float:
    """How long a server that is throttling wants to be left alone."""
    asked = str(response.headers.get("Retry-After", ""))
    return min(float(asked), THROTTLED_MAX_SECONDS) if asked.isdecimal() else THROTTLED_SECONDS


def _status(data: bytes) -> Json:
    try:
        found: object = json.loads(data)
    except ValueError:
        return {"message": data[:500].decode(errors="replace")}
    return cast(Json, found) if isinstance(found, dict) else {}
