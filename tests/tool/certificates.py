"""Certificates for tests of tool servers."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that signs itself, and its key, in PEM."""

    pem: bytes
    key: bytes

    def to_server(self, *authorities: Certificate) -> grpc.ServerCredentials:
        """For a server that wants to see a certificate of one of these."""
        return grpc.ssl_server_credentials(
            [(self.key, self.pem)],
            root_certificates=b"".join(authority.pem for authority in authorities),
            require_client_auth=True,
        )

    def to_client(self, server: Certificate) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(server.pem, self.key, self.pem)


def certificate(name: str = "localhost") -> Certificate:
    now = dt.datetime.now(dt.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signed = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certificate(
        pem=signed.public_bytes(Encoding.PEM),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
