"""Base64url without padding (RFC 7515 2), with one text for each value."""

from __future__ import annotations

import base64
import binascii


def encode(data: bytes) -> str:
    """The text of these bytes."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode(text: str) -> bytes:
    """The inverse, and only of what :func:`encode` writes. Raises ValueError.

    Padding, other alphabets and stray bits are refused, so that a signed token
    can not be rewritten into another text that still verifies.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64url") from None
    if encode(data) != text:
        raise ValueError("is not base64url")
    return data
