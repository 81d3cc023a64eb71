"""Which webhooks are refused by their URL alone, and which addresses are public."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.api.notification import Webhook
from orchestrator.core.job.webhook_urls import is_allowed, is_public, refused_notifications, refused_webhook

PRIVATE = (
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
)
PRIVATE_6 = (
    "::1",
    "::",
    "fe80::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
)


@pytest.mark.parametrize("address", [*PRIVATE, *PRIVATE_6])
def test_an_address_that_only_this_network_reaches_is_refused(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    assert not is_public(address)
    assert "no public address" in (refused_webhook(f"https://{host}/hook", "") or "")
    assert refused_webhook(f"http://{host}/hook", address) is None, "an operator may allow it"


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_what_is_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=4, network="169.254.0.0/16"))
def test_a_private_address_is_none_in_whatever_dress(inner: ipaddress.IPv4Address) -> None:
    dressed = (f"::ffff:{inner}", f"64:ff9b::{inner}", str(ipaddress.IPv6Address((0x2002 << 112) | (int(inner) << 80))))
    assert not any(map(is_public, dressed))


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "a.localhost", "127.1", "2130706433", "0x7f.1", "017700000001"]
)
def test_what_some_resolvers_take_for_this_machine_is_refused(host: str) -> None:
    assert refused_webhook(f"https://{host}/", "") is not None


def test_a_host_is_told_by_https_unless_it_is_allowed() -> None:
    assert "must be https://" in (refused_webhook("http://ci.example.com/hook", "") or "")
    assert refused_webhook("https://ci.example.com/hook", "") is None
    assert refused_webhook("http://ci.example.com/hook", "other.example.com,ci.example.com") is None
    assert "names no host" in (refused_webhook("https://ci.example.com:0/", "") or "")
    assert "is no address" in (refused_webhook("https://ci.example.com:99999/", "") or "")


def test_hosts_are_allowed_by_name_or_by_what_names_end_in() -> None:
    assert is_allowed("CI.example.com.", "ci.example.com")
    assert is_allowed("a.b.corp.example", "*.corp.example")
    assert not is_allowed("corp.example", "*.corp.example")
    assert not is_allowed("evilcorp.example", "*.corp.example")
    assert not is_allowed("ci.example.com.evil.example", "ci.example.com")
    assert not is_allowed("", "")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://ci.example.com/",
        "https://name:word@ci.example.com/",
        "https://ci.example.com/#part",
        "https://ci.example.com/a b",
        "https:///path",
        "https://ci.example.com\r\nX: y/",
        "file:///etc/passwd",
        "https://ci.example.com@10.0.0.1/",
    ],
)
def test_what_is_no_plain_address_does_not_parse(url: str) -> None:
    with pytest.raises(ValidationError):
        Webhook(name="ci", url=url)


def test_the_refusal_names_the_field() -> None:
    webhooks = (Webhook(name="a", url="https://ci.example.com/"), Webhook(name="b", url="https://10.0.0.1/x"))
    assert (refused_notifications(webhooks, "") or "").startswith(
        "spec.notifications[1].url: https://10.0.0.1/x is no "
    )
    assert refused_notifications(webhooks[:1], "") is None
