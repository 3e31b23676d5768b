"""An authority that certifies runtimes, by whatever names."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_SIDECARS = ("localhost", "acme.pdp.example")
"""Names by which a sidecar can be reached."""


class Authority:
    """Certifies a sidecar, as localhost, and its clients."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.pem = self._certify(self._name, self._key, [], is_authority=True)

    def tls_section(self, directory: Path) -> dict[str, str]:
        """listen.tcp.tls of a sidecar that asks for certificates."""
        certificate, key = self.issue(list(map(x509.DNSName, _SIDECARS)))
        for name, content in (
            ("server.pem", certificate),
            ("server.key", key),
            ("ca.pem", self.pem),
        ):
            (directory / name).write_bytes(content)
        return {
            "certificate_file": str(directory / "server.pem"),
            "key_file": str(directory / "server.key"),
            "client_ca_file": str(directory / "ca.pem"),
        }

    def client(
        self, *names: str, dns_names: Sequence[str] = (), is_authority: bool = False
    ) -> grpc.ChannelCredentials:
        """Credentials of a client whose certificate has these URIs and DNS names."""
        certificate, key = self.issue(
            [*map(x509.UniformResourceIdentifier, names), *map(x509.DNSName, dns_names)],
            is_authority=is_authority,
        )
        return grpc.ssl_channel_credentials(self.pem, key, certificate)

    def issue(
        self, names: Sequence[x509.GeneralName], *, is_authority: bool = False
    ) -> tuple[bytes, bytes]:
        """A certificate and its key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
        certificate = self._certify(subject, key, names, is_authority=is_authority)
        return certificate, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _certify(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: Sequence[x509.GeneralName],
        *,
        is_authority: bool,
    ) -> bytes:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
