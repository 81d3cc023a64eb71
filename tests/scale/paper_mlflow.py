"""An MLflow tracking server on paper: experiments and runs in memory, behind MLflow's REST interface.

    python -m tests.scale.paper_mlflow PORT

The controller talks to it through MLflow's own client. A real server with a database answers some thirty calls a second
on one core, which would be all that a test with thousands of jobs measures. `GET /runs` tells all that it has.
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from orchestrator.adapters.mlflow.tracking import UID_TAG

API = "/api/2.0/mlflow/"
Json = dict[str, Any]


class Books:
    """Experiments and runs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.run_of: dict[str, list[str]] = {}
        """Ids of runs by the uid of their job."""

    def answer(self, call: str, asked: Json) -> Json | None:
        """The answer to a call; None where there is no such thing."""
        with self.lock:
            match call:
                case "experiments/get-by-name":
                    return self._experiment(str(asked["experiment_name"]))
                case "experiments/create":
                    return {"experiment_id": self._create_experiment(asked)["experiment_id"]}
                case "experiments/set-experiment-tag":
                    tagged = next(e for e in self.experiments.values() if e["experiment_id"] == asked["experiment_id"])
                    return _tag(tagged["tags"], [asked])
                case "runs/create":
                    return self._create(asked)
                case "runs/search":
                    uid = str(asked["filter"]).split("'")[1]
                    return {"runs": [self.runs[found] for found in self.run_of.get(uid, [])]}
                case "runs/get":
                    return {"run": self.runs[asked["run_id"]]}
                case "runs/update":
                    info: Json = self.runs[asked["run_id"]]["info"]
                    info |= {key: asked[key] for key in ("status", "end_time") if key in asked}
                    return {"run_info": info}
                case "runs/log-batch":
                    return _tag(self.runs[asked["run_id"]]["data"]["tags"], asked.get("tags", []))
                case _:
                    return None

    def _experiment(self, name: str) -> Json | None:
        return {"experiment": self.experiments[name]} if name in self.experiments else None

    def _create_experiment(self, asked: Json) -> Json:
        identity = str(len(self.experiments))
        new = {"experiment_id": identity, "name": asked["name"], "lifecycle_stage": "active"}
        new |= {"artifact_location": f"mlflow-artifacts:/{identity}", "tags": list(asked.get("tags", []))}
        return self.experiments.setdefault(asked["name"], new)

    def _create(self, asked: Json) -> Json:
        run_id = f"{len(self.runs):032x}"
        info = {
            "run_id": run_id,
            "run_uuid": run_id,
            "run_name": asked.get("run_name", ""),
            "experiment_id": asked["experiment_id"],
            "user_id": "",
            "status": "RUNNING",
            "start_time": asked.get("start_time", 0),
            "artifact_uri": f"mlflow-artifacts:/{run_id}",
            "lifecycle_stage": "active",
        }
        tags = {tag["key"]: tag["value"] for tag in asked["tags"]}
        self.runs[run_id] = {"info": info, "data": {"tags": asked["tags"], "metrics": [], "params": []}}
        self.run_of.setdefault(tags[UID_TAG], []).append(run_id)
        return {"run": self.runs[run_id]}


def _tag(tags: list[Json], news: list[Json]) -> Json:
    """Put tags into a list of them; the empty answer of the calls that do so."""
    known = {tag["key"]: tag["value"] for tag in (*tags, *news)}
    tags[:] = [{"key": key, "value": value} for key, value in known.items()]
    return {}


def read_runs(port: int) -> list[tuple[str, str]]:
    """(job's uid, status) of every run."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/runs", timeout=60) as answer:
        return [(uid, status) for uid, status in json.load(answer)]


def _handler(books: Books) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/runs":
                with books.lock:
                    self._tell(
                        [(uid, books.runs[run]["info"]["status"]) for uid, runs in books.run_of.items() for run in runs]
                    )
                return
            self._reply(url.path, {key: values[0] for key, values in parse_qs(url.query).items()})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._reply(self.path, json.loads(body))

        def _reply(self, path: str, asked: Json) -> None:
            answer = books.answer(path.removeprefix(API), asked)
            if answer is None:
                self._tell({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": path}, 404)
            else:
                self._tell(answer)

        def _tell(self, answer: object, code: int = 200) -> None:
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Thousands of calls; nobody reads about them."""

    return Handler


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _handler(Books())).serve_forever()
