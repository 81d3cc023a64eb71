"""The Ray program on the head: the only file that imports Ray. Started by `head` with the controller on stdin.

Every node that carries a stage's resource gets one relay, an actor in the sidecar, which passes questions to the
agent beside it. What the agents say goes to the controller; orders of the controller go out at once. Ray ends this
process without ceremony when the head is lost, and it ends by itself when the controller hangs up; either way `head`
cleans up.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import sys
from typing import Any

from pydantic import ValidationError

from orchestrator.adapters.ray_fabric.agent import CONTROL_SOCKET_VARIABLE, RESOURCE_PREFIX
from orchestrator.adapters.ray_fabric.program import log_to_stderr
from orchestrator.adapters.ray_fabric.wire import Answer, Look, Order, Word
from orchestrator.api.protocol import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

RAY_NAMESPACE = "qlora"
FIND_SECONDS = 1.0
LOOK_SECONDS = 2.0
RETRY_SECONDS = 3.0
ANSWER_SECONDS = 10.0
"""How long an agent may take to answer its relay; a trainer that reads nothing takes it 5."""
ORDERS_LIMIT = 16
"""Orders that wait for one stage."""
REPORTS_LIMIT_BYTES = 2**20
"""Unread by the controller; beyond it the stages are asked no more until it has caught up."""


class Relay:
    """The actor: a worker process of the sidecar's node, and so beside the agent."""

    def ask(self, question: str) -> str:
        """One line to the agent, one line back."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(ANSWER_SECONDS)
            agent.connect(os.environ[CONTROL_SOCKET_VARIABLE])
            agent.sendall(question.encode() + b"\n")
            with agent.makefile("r") as lines:
                return lines.readline(MAX_MESSAGE_BYTES)


class Attendance:
    """One stage's node, attended until it is gone."""

    def __init__(self, ray: Any, key: str, node: str, controller: asyncio.StreamWriter) -> None:
        self._ray = ray
        self._key = key
        self._node = node
        self._controller = controller
        self.orders: asyncio.Queue[Order] = asyncio.Queue(ORDERS_LIMIT)

    async def attend(self) -> None:
        """Ask, and ask again; with a new relay when the old one failed."""
        while True:
            relay = self._make_relay()
            try:
                await self._converse(relay)
            except Exception as error:  # noqa: BLE001 - whatever Ray raises, a new relay is the answer
                log.warning("stage %s cannot be asked: %s", self._key, _last_line(error))
            finally:
                self._ray.kill(relay)
            await asyncio.sleep(RETRY_SECONDS)

    def _make_relay(self) -> Any:
        scheduling = importlib.import_module("ray.util.scheduling_strategies")
        return (
            self._ray.remote(Relay)
            .options(
                name=f"relay {self._key} {self._node}",
                num_cpus=0,
                resources={RESOURCE_PREFIX + self._key: 1},
                # A node that came back has the same resource, and the old one may not be known to be dead yet.
                scheduling_strategy=scheduling.NodeAffinitySchedulingStrategy(node_id=self._node, soft=False),
            )
            .remote()
        )

    async def _converse(self, relay: Any) -> None:
        while True:
            order = await self._next_order()
            request = order.request if order is not None else None
            question = (request or Look()).model_dump_json(by_alias=True)
            answer = Answer.model_validate_json(await relay.ask.remote(question))
            word = Word(key=self._key, request=request, answer=answer)
            self._controller.write(word.model_dump_json(by_alias=True).encode() + b"\n")
            await self._controller.drain()

    async def _next_order(self) -> Order | None:
        try:
            return await asyncio.wait_for(self.orders.get(), LOOK_SECONDS)
        except TimeoutError:
            return None


class Driver:
    """All stages of one head."""

    def __init__(self, ray: Any, controller: asyncio.StreamWriter) -> None:
        self._ray = ray
        self._controller = controller
        self._attended: dict[str, tuple[Attendance, asyncio.Task[None]]] = {}  # by node
        self._newest: dict[str, Attendance] = {}  # by stage

    async def find_stages(self) -> None:
        """Attend every node that carries a stage."""
        while True:
            nodes = {node: key for found in await asyncio.to_thread(self._ray.nodes) for node, key in _stage_of(found)}
            for node in self._attended.keys() - nodes.keys():
                self._leave(node)
            for node, key in nodes.items():
                if node not in self._attended:
                    self._attend(node, key)
            await asyncio.sleep(FIND_SECONDS)

    async def take_orders(self, controller: asyncio.StreamReader) -> None:
        """Pass on what the controller asks for; returns when it hangs up."""
        while line := await controller.readline():
            try:
                order = Order.model_validate_json(line)
            except ValidationError as error:
                log.warning("an order makes no sense and is ignored: %s", error)
                continue
            stage = self._newest.get(order.key)
            if stage is not None and not stage.orders.full():
                stage.orders.put_nowait(order)

    def _attend(self, node: str, key: str) -> None:
        log.info("stage %s joined", key)
        attendance = Attendance(self._ray, key, node, self._controller)
        self._attended[node] = (attendance, asyncio.create_task(attendance.attend()))
        self._newest[key] = attendance

    def _leave(self, node: str) -> None:
        attendance, task = self._attended.pop(node)
        task.cancel()
        for key, newest in list(self._newest.items()):
            if newest is attendance:
                log.info("stage %s left", key)
                del self._newest[key]


async def drive(ray: Any, connection: socket.socket) -> None:
    """Until the controller hangs up."""
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_MESSAGE_BYTES)
    writer.transport.set_write_buffer_limits(REPORTS_LIMIT_BYTES)
    driver = Driver(ray, writer)
    finding = asyncio.create_task(driver.find_stages())
    orders = asyncio.create_task(driver.take_orders(reader))
    done, _ = await asyncio.wait({finding, orders}, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def main(address: str, node_ip: str) -> int:
    """Join the head that runs here, and drive."""
    log_to_stderr()
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    ray: Any = importlib.import_module("ray")  # Any: half of Ray's own types are unknown
    ray.init(
        address=address,
        namespace=RAY_NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address=node_ip or None,
    )
    asyncio.run(drive(ray, connection))
    return 0


def _stage_of(node: dict[str, Any]) -> list[tuple[str, str]]:
    """Node and stage of a node that runs and carries one."""
    if not node["Alive"]:
        return []
    return [
        (node["NodeID"], resource.removeprefix(RESOURCE_PREFIX))
        for resource in node["Resources"]
        if resource.startswith(RESOURCE_PREFIX)
    ]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
