"""Settings of the fabric's two programs, read from the environment: every field is `QLORA_RAY_<FIELD>`.

The token is Ray's own variable, `RAY_AUTH_TOKEN`, because only Ray's processes read it. A node listens on
`node_port` and the PORTS_PER_NODE - 1 ports after it; the head also on `port`. So a network policy needs two ranges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestrator.api.task import AGENT_SOCKET_VARIABLE

PORTS_PER_NODE = 20
STAGE_PATTERN = r"^[a-z0-9][-a-z0-9]*/[a-z0-9][-a-z0-9]*$"

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=1024, le=65_535 - PORTS_PER_NODE)]


class NodeSettings(BaseSettings):
    """Settings of a Ray node, whichever program runs it."""

    model_config = SettingsConfigDict(
        env_prefix="QLORA_RAY_", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    folder: Path = Path("/tmp/fabric")  # noqa: S108 - a volume of the container's own
    """Ray's sockets, logs and shared memory. Short, because sockets are in it (at most 40 bytes)."""
    node_ip: str = ""
    """The address that other nodes reach this one at; found from the route to the head unless given."""
    node_port: Port = 6380
    """The first of the ports that the node listens on."""
    object_store_bytes: int = Field(default=80 * 2**20, ge=80 * 2**20)
    """Ray's shared memory: its least. The fabric passes nothing through it."""
    start_seconds: Seconds = 120.0
    """How long a node may take to start."""
    retry_base_seconds: Seconds = 0.5
    """Wait before the next try; doubles up to the longest, with jitter."""
    retry_max_seconds: Seconds = 15.0
    """Longest wait before the next try."""


class HeadSettings(NodeSettings):
    """Settings of `python -m orchestrator.adapters.ray_fabric.head`."""

    fabric_socket: Path = Path("/var/run/qlora/fabric.sock")
    """Where the controller connects; on a volume that the two containers share."""
    port: Port = 6379
    """Where the agents find the head."""


class AgentSettings(NodeSettings):
    """Settings of `python -m orchestrator.adapters.ray_fabric.agent`."""

    address: str = Field(pattern=r"^.+:[0-9]{1,5}$")
    """`host:port` of the head. The host may stand for several addresses: the one that answers is the leader's."""
    stage: str = Field(pattern=STAGE_PATTERN)
    """`namespace/name` of the stage whose trainer is here."""
    agent_socket: Path = Field(validation_alias=AliasChoices("agent_socket", AGENT_SOCKET_VARIABLE))
    """The trainer's socket (`QLORA_AGENT_SOCKET`)."""
    silence_seconds: Seconds = 30.0
    """A head that asks nothing for so long is lost: the node is thrown away, and the agent looks for the next head."""
