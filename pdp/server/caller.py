"""Who calls, as transport and metadata say: what identity is then worked out from."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final, Protocol, TypeVar

from cryptography import x509

from pdp.certificates import shown_to_grpc, thumbprint
from pdp.identity.resolver import Credentials, Peer
from pdp.server import wire

_SERVER_NAME: Final = "ssl_requested_server_name"
_MALFORMED: Final = (
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Context(Protocol):
    """What is asked of gRPC's own context."""

    def invocation_metadata(self) -> wire.Metadata | None:
        """What the caller has sent along."""
        ...

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the transport has verified."""
        ...


def caller_of(context: Context, *, listener: str) -> tuple[Credentials, str | None]:
    """The credentials of a call that came in by this listener, and its trace id."""
    metadata = context.invocation_metadata() or ()
    return wire.credentials_of(metadata, peer_of(context, listener=listener)), wire.trace_id_of(
        metadata
    )


def trace_id(context: Context) -> str | None:
    """The trace id of a call, if it has one."""
    return wire.trace_id_of(context.invocation_metadata() or ())


def peer_of(context: Context, *, listener: str) -> Peer:
    """What the transport knows of the caller. gRPC shows a client's certificate only where
    it was verified against listen.tcp.tls.client_ca_file.
    """
    known = context.auth_context()
    certificate = shown_to_grpc(known)
    peer = _peer_with(certificate, listener) if certificate else Peer(listener=listener)
    for name in known.get(_SERVER_NAME, ()):
        peer = replace(peer, server_name=name.decode("ascii", errors="replace"))
    return peer


@functools.lru_cache(maxsize=1_024)
def _peer_with(pem: bytes, listener: str) -> Peer:
    uris, dns_names = _names_in(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")))
    return Peer(
        listener=listener,
        certificate_sha256=thumbprint(pem),
        uris=uris,
        dns_names=dns_names,
    )


def _names_in(der: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """URIs and DNS names. A certificate that is not well-formed names nobody, and neither
    does one that may sign others (X509-SVID 4.1).
    """
    try:
        extensions = x509.load_der_x509_certificate(der).extensions
        constraints = _extension(extensions, x509.BasicConstraints)
        names = _extension(extensions, x509.SubjectAlternativeName)
        if names is None or (constraints is not None and constraints.ca):
            return (), ()
        return (
            tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
            tuple(names.get_values_for_type(x509.DNSName)),
        )
    except _MALFORMED:
        return (), ()


_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def _extension(extensions: x509.Extensions, kind: type[_Extension]) -> _Extension | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
