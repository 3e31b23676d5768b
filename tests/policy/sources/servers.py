"""Servers that hand out bundles, well or badly, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import ipaddress
import json
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict

from pdp.policy.archive import pack
from pdp.policy.sources.source import BundleSource, Fetched

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def archive(number: int) -> bytes:
    return pack({"data.json": json.dumps({"number": number}).encode()})


@contextlib.contextmanager
def web_server(handler: Handler, *, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve every path with a handler, on a thread; HOST:PORT."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def on_loop(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    async def start() -> web.AppRunner:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        return runner

    runner = on_loop(start())
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        on_loop(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def raw_server(
    *pieces: bytes, hold: bool = False, reset: bool = False, drip_seconds: float = 0.0
) -> Iterator[str]:
    """Answer every connection with these bytes, with pauses between, then close it, hold it
    open, or reset it.
    """
    ended = threading.Event()

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection: socket.socket = self.request
            connection.recv(65536)
            with contextlib.suppress(OSError):
                for piece in pieces:
                    connection.sendall(piece)
                    if ended.wait(drip_seconds):
                        return
                if hold:
                    ended.wait(20)
                if reset:  # to close at once with something unsent is to reset
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.close()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()
            server.shutdown()
            thread.join()


def answering(body: bytes = b"", status: int = 200, **headers: str) -> Handler:
    """Answer every request in the same way; "_" in a header's name is "-"."""

    async def handle(_request: web.Request) -> web.Response:
        return web.Response(
            body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    return handle


def fetched(source: BundleSource, *tags: str | None) -> list[Fetched | None]:
    """What comes of fetching once with each tag."""

    async def run() -> list[Fetched | None]:
        try:
            return [await source.fetch(tag) for tag in tags]
        finally:
            await source.close()

    return asyncio.run(run())


class Authority:
    """Makes certificates, in files."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir()
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(self._name, self._key, is_authority=True)
        self.file = directory / "ca.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str, *, password: bytes | None = None) -> tuple[Path, Path]:
        """Certificate and key for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate_file = self._directory / f"{name}.pem"
        key_file = self._directory / f"{name}.key"
        certificate_file.write_bytes(
            self._signed(subject, key, is_authority=False).public_bytes(Encoding.PEM)
        )
        encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
        return certificate_file, key_file

    def server_context(self, *, needs_client: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue("server"))
        if needs_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.file)
        return context

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
    ) -> x509.Certificate:
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
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if is_authority:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True,
                content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, encipher_only=False, decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        else:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())


class FakeRegistry:
    """An OCI registry: manifests and blobs of one repository, behind Basic or tokens."""

    def __init__(self, *, auth: str = "none", redirect_to: str | None = None) -> None:
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens_given = 0
        self.auth = auth
        self.redirect_to = redirect_to
        self.realm: str | None = None
        self.token_answer: Any = None
        self.names_digests = True

    def push(self, tag: str, content: bytes, **changes: Any) -> str:
        """A manifest with one layer; its digest."""
        digest = digest_of(content)
        self.blobs[digest] = content
        layer = {"mediaType": LAYER, "digest": digest, "size": len(content)}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest_of(b"{}"),
                "size": 2,
            },
            "layers": [layer],
            **changes,
        }
        return self.put_manifest(tag, manifest)

    def put_manifest(self, tag: str, manifest: Mapping[str, Any]) -> str:
        body = json.dumps(manifest).encode()
        kind = str(manifest.get("mediaType", ""))
        self.manifests[tag] = self.manifests[digest_of(body)] = (kind, body)
        return digest_of(body)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.asked.append(f"{request.method} {path}")
        if path == "/token":
            return self._token(request)
        if not self._is_let_in(request):
            return self._challenge(request)
        kind, _, reference = path.removeprefix("/v2/policies/acme/").partition("/")
        if kind == "manifests" and reference in self.manifests:
            media_type, body = self.manifests[reference]
            headers = {"Content-Type": media_type or "text/plain"}
            if self.names_digests:
                headers["Docker-Content-Digest"] = digest_of(body)
            return web.Response(body=body, headers=headers)
        if kind == "blobs" and reference in self.blobs:
            return self._blob(request, self.blobs[reference])
        return web.Response(status=404)

    def _challenge(self, request: web.Request) -> web.Response:
        realm = self.realm or f"http://{request.host}/token"
        headers = CIMultiDict[str]()
        if self.auth in {"basic", "both"}:
            headers.add("WWW-Authenticate", 'Basic realm="registry"')
        if self.auth in {"token", "both"}:
            bearer = f'Bearer realm="{realm}",service="registry",scope="repository:x:push,pull"'
            headers.add("WWW-Authenticate", bearer)
        return web.Response(status=401, headers=headers, body=b"x" * 9999)

    def _blob(self, request: web.Request, content: bytes) -> web.Response:
        if self.redirect_to is not None and "stored" not in request.query:
            to = self.redirect_to.format(host=request.host, path=request.path)
            return web.Response(status=307, headers={"Location": to})
        if "stored" in request.query and "Authorization" in request.headers:
            return web.Response(status=400)
        return web.Response(body=content)

    def _is_let_in(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization")
        if self.auth == "none" or "stored" in request.query:
            return True
        if self.auth == "basic":
            return given == "Basic YW5uOnMzY3JldA=="
        return given == f"Bearer token-{self.tokens_given}" and self.tokens_given > 0

    def _token(self, request: web.Request) -> web.Response:
        wanted = {"scope": "repository:policies/acme:pull", "service": "registry"}
        if dict(request.query) != wanted:
            return web.Response(status=400)
        if self.token_answer is not None:
            return web.json_response(self.token_answer)
        if request.headers.get("Authorization") not in {None, "Basic YW5uOnMzY3JldA=="}:
            return web.Response(status=401)
        self.tokens_given += 1
        return web.json_response({"token": f"token-{self.tokens_given}", "expires_in": 300})


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
