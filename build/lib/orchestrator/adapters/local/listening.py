"""Which addresses a tree of processes listens on, as the kernel tells."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
LISTEN_STATE = "0A"  # proc(5): the state of a listening socket in net/tcp
SOCKET = re.compile(r"socket:\[(\d+)\]")


def listening_elsewhere(root: int) -> list[str]:
    """`program on address:port` of each socket that other machines can reach, of the process and its descendants."""
    open_sockets = {inode: address for inode, address in _listening() if not _is_loopback(address[0])}
    return sorted(
        f"{_name(pid)} on {open_sockets[inode][0]}:{open_sockets[inode][1]}"
        for pid in process_tree(root)
        for inode in _sockets(pid)
        if inode in open_sockets
    )


def process_tree(root: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for pid in tree:  # grows while it is walked
        tree += children.get(pid, [])
    return tree


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _listening() -> Iterator[tuple[str, tuple[str, int]]]:
    """Inode, address and port of each listening TCP socket."""
    for table in ("net/tcp", "net/tcp6"):
        for line in (PROC / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN_STATE:
                address, _, port = fields[1].partition(":")
                yield fields[9], (_address(address), int(port, 16))


def _address(text: str) -> str:
    """The kernel writes 32-bit words, each in the machine's order of bytes."""
    words = [text[start : start + 8] for start in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in words)))


def _sockets(pid: int) -> Iterator[str]:
    try:
        for handle in (PROC / str(pid) / "fd").iterdir():
            try:
                found = SOCKET.fullmatch(os.readlink(handle))
            except OSError:  # closed meanwhile
                continue
            if found:
                yield found[1]
    except OSError:  # ended, or another user's
        return


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _name(pid: int) -> str:
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return f"process {pid}"
