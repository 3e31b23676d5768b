"""A client's certificate, as gRPC shows it: signed by whom the sidecar trusts, and holding
whatever it holds (pdp.server.caller).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ssl
import warnings
from collections.abc import Iterable, Mapping
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID

from pdp import base64url
from pdp.server.caller import peer_of
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited_bytes
from tests.fuzz.targets.workload_names import NAMES, SPIFFE_ID

DAY: Final = dt.datetime(2026, 11, 25, tzinfo=dt.UTC)
SUBJECT: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent")])
LEAF: Final = b"\x30\x00"
AUTHORITY: Final = b"\x30\x03\x01\x01\xff"
"""BasicConstraints with cA (RFC 5280 4.2.1.9)."""
NAMES_EXTENSION: Final = ExtensionOID.SUBJECT_ALTERNATIVE_NAME.dotted_string
EXTENSIONS: Final = (NAMES_EXTENSION, "2.5.29.19", "2.5.29.15", "2.5.29.30", "2.5.29.37", "1.2.3.4")


def samples() -> Iterable[bytes]:
    yield b"\0"
    yield b"\1\2\0\0\1\0\0"


class _Shown:
    """gRPC's context, with that certificate."""

    def __init__(self, pem: bytes) -> None:
        self._pem = pem

    def invocation_metadata(self) -> None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {"x509_pem_cert": [self._pem], "ssl_requested_server_name": [b"pdp"]}


def one_input(data: bytes) -> bool:
    with warnings.catch_warnings():
        # Of serial numbers below one.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return _shown(Choices(data))


def _shown(choices: Choices) -> bool:
    constraints = choices.pick([LEAF, AUTHORITY]) if choices.number(2) == 0 else None
    extensions = [(NAMES_EXTENSION, _names(choices))]
    if constraints is not None:
        extensions.append(("2.5.29.19", constraints))
    if choices.number(4) == 1:
        extensions.append((choices.pick(EXTENSIONS), choices.some()))
    der = _signed(extensions)
    if choices.are_left:
        der = edited_bytes(der, choices)
    pem = ssl.DER_cert_to_PEM_cert(der).encode("ascii")
    peer = peer_of(_Shown(pem), listener="tcp")
    assert peer.certificate_sha256 == base64url.encode(hashlib.sha256(der).digest())
    assert (peer.listener, peer.server_name) == ("tcp", "pdp")
    for name in (*peer.uris, *peer.dns_names):
        assert name.encode() in der, "a name that the certificate does not hold"
    if peer.uris or peer.dns_names:
        assert AUTHORITY not in der or _is_leaf(der), "whoever signs others is somebody"
    return SPIFFE_ID in peer.uris


def _is_leaf(der: bytes) -> bool:
    """Whether the words of an authority stand elsewhere in it only."""
    found = x509.load_der_x509_certificate(der).extensions
    try:
        return not found.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return True


def _names(choices: Choices) -> bytes:
    """SubjectAltName (RFC 5280 4.2.1.6): names of any kind, in any bytes."""
    names = [_tagged(0x86, SPIFFE_ID.encode())]
    for _ in range(choices.number(4)):
        content = choices.pick(NAMES).encode() if choices.number(2) == 0 else choices.some()
        names.append(_tagged(choices.pick([0x86, 0x82, 0x81, 0x87, 0x88, 0xA4, 0xA0]), content))
    return _tagged(0x30, b"".join(names))


def _tagged(tag: int, content: bytes) -> bytes:
    """A value of DER (X.690 8.1)."""
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content


def _signed(extensions: Iterable[tuple[str, bytes]]) -> bytes:
    builder = x509.CertificateBuilder(
        issuer_name=SUBJECT,
        subject_name=SUBJECT,
        public_key=jose.KEY.public_key(),
        serial_number=1,
        not_valid_before=DAY,
        not_valid_after=DAY + dt.timedelta(days=1),
    )
    known = set()
    for name, content in extensions:
        if name not in known:
            known.add(name)
            identifier = x509.ObjectIdentifier(name)
            builder = builder.add_extension(
                x509.UnrecognizedExtension(identifier, content), critical=False
            )
    return builder.sign(jose.KEY, None).public_bytes(Encoding.DER)
