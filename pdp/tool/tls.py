"""The client certificate of an ASGI connection (ASGI's TLS extension)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdp import certificates


def certificate_sha256(scope: Mapping[str, Any]) -> str:
    """Of the certificate that the server has verified, as in Permit.certificate_sha256.
    Empty where there is none, it was not verified, or the server does not say.
    """
    tls = scope.get("extensions", {}).get("tls", {})
    chain = tls.get("client_cert_chain") or ()
    # The extension says None where verification found no error; unsaid is not None.
    if not chain or tls.get("client_cert_error", "unsaid") is not None:
        return ""
    try:
        return certificates.thumbprint(next(iter(chain)).encode("ascii"))
    except ValueError:
        return ""
