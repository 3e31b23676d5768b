"""Base64url without padding (RFC 7515 2), with one text for each value."""

from __future__ import annotations

import binascii
from typing import Final

_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


def encode(data: bytes) -> str:
    """The text of these bytes."""
    text = binascii.b2a_base64(data, newline=False).rstrip(b"=")
    return text.translate(_TO_URL).decode("ascii")


def decode(text: str) -> bytes:
    """The inverse, and only of what :func:`encode` writes. Raises ValueError.

    Padding, other alphabets and stray bits are refused, so that a signed token
    can not be rewritten into another text that still verifies.
    """
    padded = text + "=" * (-len(text) % 4)
    try:
        data = binascii.a2b_base64(padded.encode("ascii").translate(_FROM_URL), strict_mode=True)
    except ValueError:
        raise ValueError("is not base64url") from None
    if encode(data) != text:
        raise ValueError("is not base64url")
    return data
