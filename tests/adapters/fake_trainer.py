"""A trainer that trains nothing: a real process that obeys the contract of stages. Standard library only.

    python -S fake_trainer.py prepare | train | publish

It appends a line to `<store>/starts.log` whenever it starts. The name of the dataset file is the train stage's script:

    ok              do the stage's work: training is spec.training.maxSteps steps of STEP_SECONDS, each durable at once
    exit-83         exit with that code and a failure message
    silent-1        exit with that code and no message
    garbage         write a termination message that does not parse, and exit with 0
    endless         like ok, but train until there is a file `<store>/finish`
    stubborn        train for a minute and ignore SIGTERM
    children        start a child that sleeps for a minute, note its pid in `<store>/child`, exit with 0
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

STEP_SECONDS = 0.02
DIGEST = "sha256:" + "0" * 64
MODEL = {
    "modelType": "llama",
    "architecture": "LlamaForCausalLM",
    "hiddenSize": 64,
    "intermediateSize": 128,
    "numLayers": 2,
    "numAttentionHeads": 4,
    "numKeyValueHeads": 4,
    "headDim": 16,
    "vocabSize": 256,
    "tiedEmbeddings": True,
    "revision": "r",
}


def main() -> int:
    stage = sys.argv[1]
    task = json.loads(os.environ["QLORA_TASK"])
    store = task["storeUri"].removeprefix("file://")
    os.makedirs(store, exist_ok=True)
    with open(f"{store}/starts.log", "a") as starts:
        starts.write(f"{task['job']}-{stage}-{task['attempt']} {os.getpid()}\n")
    print(f"{stage} runs with pid {os.getpid()}", flush=True)
    script = os.path.basename(task["spec"]["dataset"]["source"])
    verb, _, code = script.partition("-") if stage == "train" else ("ok", "", "")
    if verb in ("exit", "silent"):
        if verb == "exit":
            answer({"failure": {"reason": "UserError", "message": "line 7 is broken"}})
        return int(code)
    if verb == "garbage":
        answer("not json")
        return 0
    if verb == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        return 0
    if verb == "children":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        with open(f"{store}/child", "w") as file:
            file.write(str(child.pid))
        return 0
    return {"prepare": prepare, "train": train, "publish": publish}[stage](task, store)


def prepare(task: dict[str, Any], store: str) -> int:
    counts = {"trainRecords": 1, "trainSequences": 1, "trainTokens": 1, "supervisedTokens": 1}
    held_out = {"evalRecords": 0, "evalSequences": 0}
    steps = task["spec"]["training"].get("maxSteps") or 1
    answer({"prepare": {"digest": DIGEST, "uri": store, "model": MODEL, **counts, **held_out, "steps": steps}})
    return 0


def train(task: dict[str, Any], store: str) -> int:
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    agent = None
    steps = task["spec"]["training"].get("maxSteps") or 1
    step = int(read(f"{store}/step") or 0)
    endless = os.path.basename(task["spec"]["dataset"]["source"]) == "endless"

    def done() -> bool:
        return os.path.exists(f"{store}/finish") if endless else step >= steps

    while not done() and not asked:
        time.sleep(STEP_SECONDS)
        step += 1
        write(f"{store}/step", str(step))
        agent = report(agent, step, steps)
    result = {"step": step, "complete": done(), "checkpointUri": f"{store}/step"}
    if not done():
        answer({"train": result})
        return 85
    write(f"{store}/adapter", "adapter")
    answer({"train": {**result, "adapterUri": f"{store}/adapter", "adapterDigest": DIGEST}})
    return 0


def publish(task: dict[str, Any], store: str) -> int:
    answer({"publish": {"registeredModel": task["job"], "modelVersion": "1", "modelUri": f"models:/{task['job']}/1"}})
    return 0


def connect() -> "socket.socket | None":
    agent = socket.socket(socket.AF_UNIX)
    try:
        agent.connect(os.environ["QLORA_AGENT_SOCKET"])
    except OSError:
        agent.close()
        return None
    return agent


def report(agent: "socket.socket | None", step: int, steps: int) -> "socket.socket | None":
    """Tell the agent, if it is there; the connection to go on with."""
    agent = agent or connect()
    figures = {
        "stage": "train",
        "step": step,
        "steps": steps,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    try:
        if agent is not None:
            agent.sendall(json.dumps({"type": "progress", "report": figures}).encode() + b"\n")
    except OSError:
        return None
    return agent


def answer(message: object) -> None:
    write(os.environ["QLORA_TERMINATION_LOG"], message if isinstance(message, str) else json.dumps(message))


def read(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    sys.exit(main())
