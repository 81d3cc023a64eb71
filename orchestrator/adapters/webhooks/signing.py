"""Signatures of Standard Webhooks 1.0.0: HMAC-SHA256 over id, time and body, with a secret that both sides have.

Source: github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md, "Signature scheme".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from orchestrator.errors import TransientError

PREFIX = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64
MAX_SECRETS = 4
MAKE_ONE = 'make one with: echo "whsec_$(openssl rand -base64 32)"'


def keys_of(secret: str) -> tuple[bytes, ...]:
    """The keys in a text of secrets, separated by blanks: several while receivers change from one to the other.

    Raises TransientError for what is no secret, which somebody may put right. The message does not show it.
    """
    words = secret.split()
    if not 1 <= len(words) <= MAX_SECRETS:
        raise TransientError(f"its secret has to be 1 to {MAX_SECRETS} of {PREFIX}..., separated by blanks; {MAKE_ONE}")
    return tuple(map(_key, words))


def signatures(keys: tuple[bytes, ...], webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of the header webhook-signature: one signature a key."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def _key(word: str) -> bytes:
    try:
        key = base64.b64decode(word.removeprefix(PREFIX), validate=True) if word.startswith(PREFIX) else b""
    except binascii.Error:
        key = b""
    if not LEAST_BYTES <= len(key) <= MOST_BYTES:
        raise TransientError(
            f"its secret is not {PREFIX} and {LEAST_BYTES} to {MOST_BYTES} bytes in base64; {MAKE_ONE}"
        )
    return key
