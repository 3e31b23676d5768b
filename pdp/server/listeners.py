"""Where the sidecar listens: sockets, ports and their certificates."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pdp.config import Listen, ServerLimits, TcpListener, Tls
from pdp.server.locks import ExclusiveLock, StartError


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Where one gRPC server listens. gRPC does not say by which of its ports a call came
    in, so whatever has a name of its own has a server of its own.
    """

    name: str
    """As in Peer.listener."""
    unix: Path | None
    unix_mode: str
    tcp: TcpListener | None


def listeners(listen: Listen) -> Iterator[Listener]:
    """The usual one, if there is one, and those with names."""
    if listen.unix is not None or listen.tcp is not None:
        yield Listener(name="", unix=listen.unix, unix_mode=listen.unix_mode, tcp=listen.tcp)
    for name, named in listen.named.items():
        yield Listener(name=name, unix=named.unix, unix_mode=named.unix_mode, tcp=named.tcp)


def bind(
    listener: Listener, server: grpc.aio.Server, stack: contextlib.AsyncExitStack
) -> list[str]:
    """Bind a server; where it listens, for the operator. Raises StartError."""
    places = []
    if listener.unix is not None:
        path = listener.unix
        lock = ExclusiveLock(path.with_name(path.name + ".lock"), holds=f"The socket {path}")
        stack.callback(lock.release)
        # With the lock in hand, a socket that is there is what a killed sidecar left.
        _remove_socket(path)
        # Others have no access from the moment the socket exists.
        earlier = os.umask(0o777 & ~int(listener.unix_mode, 8))
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise StartError(f"The socket {path} can not be made; is its path too long?") from None
        finally:
            os.umask(earlier)
        stack.callback(_remove_socket, path)
        places.append(f"unix:{path}")
    tcp = listener.tcp
    if tcp is not None:
        try:
            port = (
                server.add_insecure_port(tcp.address)
                if tcp.tls is None
                else server.add_secure_port(tcp.address, _server_credentials(tcp.tls))
            )
        except RuntimeError:
            raise StartError(
                f"The address {tcp.address} can not be listened on; is it in use?"
            ) from None
        places.append(f"{tcp.address.rpartition(':')[0]}:{port}")
    return places


def options(limits: ServerLimits) -> list[tuple[str, int]]:
    """The settings of every gRPC server."""
    return [
        ("grpc.so_reuseport", 0),  # a second sidecar on the port must fail, not share
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", limits.max_concurrent_streams),
        ("grpc.keepalive_time_ms", limits.keepalive_seconds * 1000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def read_file(path: Path) -> bytes:
    """What a file holds. Raises StartError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{path} can not be read: {error.strerror}.") from None


def _remove_socket(path: Path) -> None:
    """Raises StartError for a file of another kind: the configuration is wrong."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartError(
                f"{path} is no socket, and is left as it is: name another path (listen)."
            )
        path.unlink()
    except FileNotFoundError:
        pass


def _server_credentials(tls: Tls) -> grpc.ServerCredentials:
    certificate, key = read_file(tls.certificate_file), read_file(tls.key_file)
    authorities = read_file(tls.client_ca_file) if tls.client_ca_file else None
    # gRPC itself says no more of a bad file than that it could not listen.
    try:
        public = x509.load_pem_x509_certificates(certificate)[0].public_key()
    except ValueError:
        raise StartError(f"{tls.certificate_file} holds no PEM certificate.") from None
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        raise StartError(f"{tls.key_file} holds no unencrypted PEM key.") from None
    if private.public_key() != public:
        raise StartError(f"{tls.key_file} is not the key of {tls.certificate_file}.")
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=authorities,
        require_client_auth=authorities is not None,
    )
