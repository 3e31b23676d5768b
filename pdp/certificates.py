"""Client certificates, as permits are bound to them (RFC 8705 3.1)."""

from __future__ import annotations

import functools
import hashlib
import ssl
from collections.abc import Iterable, Mapping
from typing import Final

from pdp import base64url

_PEM: Final = "x509_pem_cert"


def shown_to_grpc(auth_context: Mapping[str, Iterable[bytes]]) -> bytes:
    """The client's certificate in PEM, empty where there is none. gRPC shows one only where
    it was verified against the server's own authorities.
    """
    for certificate in auth_context.get(_PEM, ()):
        return certificate
    return b""


@functools.lru_cache(maxsize=1_024)
def thumbprint(pem: bytes) -> str:
    """SHA-256 of the certificate's DER form, in base64url: the member x5t#S256 of a cnf
    claim. Empty for no certificate. Raises ValueError for what is none.
    """
    if not pem:
        return ""
    der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    return base64url.encode(hashlib.sha256(der).digest())
