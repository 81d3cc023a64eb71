"""What a job needs from the release: Ray's head, MLflow, and a store to write to. Run by `helm test`."""

import os
import pathlib
import socket
import sys
import time
import urllib.error
import urllib.request

PATIENCE_SECONDS = 120
PAUSE_SECONDS = 3


def ray_answers() -> str:
    """Empty, or why not; any one replica will do, because only the leader runs the head."""
    if "RAY_HOST" not in os.environ:
        return ""
    where, reasons = (os.environ["RAY_HOST"], int(os.environ["RAY_PORT"])), []
    try:
        found = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"{where[0]}: {error}"
    for *_, address in found:
        try:
            socket.create_connection(address[:2], timeout=5).close()
        except OSError as error:
            reasons.append(f"{address}: {error}")
        else:
            return ""
    return "Ray's head does not answer: " + "; ".join(reasons)


def mlflow_answers() -> str:
    """Empty, or why not; a server that asks who we are answers, too."""
    uri = os.environ["TRACKING_URI"].rstrip("/")
    if not uri.startswith("http"):
        return ""
    try:
        urllib.request.urlopen(f"{uri}/version", timeout=10).close()  # noqa: S310 - http, see above
    except urllib.error.HTTPError as error:
        return "" if error.code in (401, 403) else f"MLflow at {uri}: {error}"
    except OSError as error:
        return f"MLflow at {uri}: {error}"
    return ""


def store_takes_files() -> str:
    """Empty, or why not; a store on S3 is the jobs' own business."""
    if "STORE_FOLDER" not in os.environ:
        return ""
    path = pathlib.Path(os.environ["STORE_FOLDER"], f".check-{os.getpid()}-{socket.gethostname()}")
    try:
        path.write_bytes(b"")
        path.unlink()
    except OSError as error:
        return f"the store's claim: {error}"
    return ""


deadline = time.monotonic() + PATIENCE_SECONDS
while True:
    pathlib.Path("/tmp/checked").touch()  # noqa: S108 - the pod's own volume, which its probes look into
    problems = [problem for problem in (ray_answers(), mlflow_answers(), store_takes_files()) if problem]
    if not problems or time.monotonic() > deadline:
        break
    time.sleep(PAUSE_SECONDS)
sys.exit("\n".join(problems) or None)
