"""Who calls, as transport and metadata say: what identity is then worked out from."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pdp import base64url
from pdp.identity.resolver import Credentials, Peer
from pdp.server import wire

_PEM: Final = "x509_pem_cert"


class Context(Protocol):
    """What is asked of gRPC's own context."""

    def invocation_metadata(self) -> wire.Metadata | None:
        """What the caller has sent along."""
        ...

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the transport has verified."""
        ...


def caller_of(context: Context, *, listener: str = "") -> tuple[Credentials, str | None]:
    """The credentials of a call, and its trace id."""
    metadata = context.invocation_metadata() or ()
    return wire.credentials_of(metadata, peer_of(context, listener)), wire.trace_id_of(metadata)


def trace_id(context: Context) -> str | None:
    """The trace id of a call, if it has one."""
    return wire.trace_id_of(context.invocation_metadata() or ())


def peer_of(context: Context, listener: str = "") -> Peer:
    """What the transport knows of the caller. gRPC shows a client's certificate only where
    it was verified against listen.tcp.tls.client_ca_file.
    """
    for certificate in context.auth_context().get(_PEM, ()):
        return _peer_with(certificate, listener)
    return Peer(listener=listener)


@functools.lru_cache(maxsize=1_024)
def _peer_with(pem: bytes, listener: str) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    der = certificate.public_bytes(Encoding.DER)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    return Peer(
        listener=listener,
        certificate_sha256=base64url.encode(hashlib.sha256(der).digest()),
        uris=tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        dns_names=tuple(names.get_values_for_type(x509.DNSName)),
    )
