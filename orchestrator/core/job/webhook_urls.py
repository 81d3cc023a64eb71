"""Which webhooks may be told: a service that sends requests for strangers must not reach for what only it can reach.

A webhook is an `https://` address whose host is public on the internet; a host that an operator allows may be any, by
`http://`, too. What can be told from the URL alone is refused when a job comes; whoever sends looks at the addresses
that the host's name stands for, too, each time (`is_public`), and follows no redirect.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from orchestrator.api.notification import Webhook

SETTING = "QLORA_WEBHOOK_ALLOWED_HOSTS"
NOT_PUBLIC = f"is no public address; have an operator allow the host ({SETTING}; webhooks.allowedHosts of the chart)"
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))
"""IPv6 addresses whose last four bytes are an IPv4 address that a gateway, or the host itself, makes of them."""


def refused_notifications(webhooks: Sequence[Webhook], allowed_hosts: str) -> str | None:
    """Why the webhooks of a job or a queue are refused, by the field; None where they are not."""
    for place, webhook in enumerate(webhooks):
        why = refused_webhook(webhook.url, allowed_hosts)
        if why is not None:
            return f"spec.notifications[{place}].url: {webhook.url} {why}"
    return None


def refused_webhook(url: str, allowed_hosts: str) -> str | None:
    """Why nobody may be told at this URL, and what to write instead; None where nothing is against it."""
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
    except ValueError as error:
        return f"is no address: {error}"
    if not host or port == 0:
        return "names no host, or a port that there is not"
    if is_allowed(host, allowed_hosts):
        return None
    if split.scheme != "https":
        return f"must be https://, unless an operator allows the host by its name ({SETTING})"
    return NOT_PUBLIC if _is_surely_not_public(host) else None


def is_allowed(host: str, allowed_hosts: str) -> bool:
    """Whether an operator allows the host: by its name, or by `*.` and what its name ends in."""
    name = host.lower().rstrip(".")
    for allowed in filter(None, allowed_hosts.lower().split(",")):
        if name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])):
            return True
    return False


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, to which anybody may send, and no way round to another."""
    known = ip_address(address.partition("%")[0])
    if isinstance(known, IPv6Address) and (inner := _inside(known)) is not None:
        known = inner
    return known.is_global and not (known.is_multicast or known.is_reserved or known.is_unspecified)


def _inside(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that is meant by an IPv6 address."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if any(address in network for network in _TRANSLATED):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def _is_surely_not_public(host: str) -> bool:
    """What the name itself says: `localhost`, an address, or a number that some resolvers take for one."""
    name = host.lower().rstrip(".")
    last = name.rpartition(".")[2]
    if last == "localhost":
        return True
    try:
        return not is_public(name)
    except ValueError:
        return last[:1].isdigit()
