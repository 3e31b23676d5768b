"""Known secrets through a whole life of a sidecar and of those around it: none is left anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import traceback
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import serialization

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.client import AsyncGuard, Guard, current_permit
from pdp.config import ConfigError, load_config
from pdp.permit import Permit, PermitError
from pdp.permit.ring import LiveKeys
from pdp.testing import Caller, SidecarProcess, TokenIssuer, refusal_of
from tests.budget.redis_server import RedisServer
from tests.e2e.operating import soon
from tests.field.shop import door_of, serving, told
from tests.field.world import write_bundle
from tests.secrets.planted import ChildrenSeen, Planted, spellings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDP: Final = TokenIssuer()
MARK: Final = "planted:argument/4711+secret"
"""Stands wherever a caller can write something."""
SHIPPED: Final = {"order_id": "918", "status": "shipped"}


class Places(BaseHTTPRequestHandler):
    """Keys and bundles for whoever has the token; who has not gets to hear what was shown."""

    tokens: tuple[str, ...] = ()
    folder = Path()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def do_GET(self) -> None:
        shown = self.headers.get("authorization", "")
        right = shown.removeprefix("Bearer ") in self.tokens
        body = (self.folder / self.path[1:]).read_bytes() if right else f"no: {shown}".encode()
        self.send_response(200 if right else 401)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", f'"{hash(body)}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


@contextmanager
def places(folder: Path, *tokens: str) -> Iterator[str]:
    handler = type("Handler", (Places,), {"tokens": tokens, "folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class World:
    """A sidecar with all its secrets, and what everybody around it has been told."""

    def __init__(self, folder: Path) -> None:
        self.planted = Planted()
        self.planted.add("a marked argument", MARK)
        self.said: list[str] = []
        self.given, self.served, self.temporary, self.home = (
            folder / name for name in ("given", "served", "tmp", "sidecar")
        )
        for each in (self.given, self.served, self.temporary, self.home):
            each.mkdir()
        IDP.write_jwks(self.served / "jwks.json")
        write_bundle(self.served / "bundle.tar.gz")
        self.keys = self.secret_file("keys", "bearer of the key set")
        self.bundles = self.secret_file("bundles", "bearer of the bundle source")
        self.password = self.secret_file("password", "the store's password")
        self.permit_key = self.given / "permit-key.pem"
        LiveKeys(self.permit_key, make=True)
        self.remember_keys()
        self.redis = RedisServer(
            folder / "redis", f"user pdp on >{self.read(self.password)} ~* +@all"
        )

    def secret_file(self, name: str, what: str) -> Path:
        path = self.given / name
        path.write_text(self.planted.add(what, f"{name}-{uuid.uuid4()}") + "\n", encoding="utf-8")
        path.chmod(0o600)
        return path

    @staticmethod
    def read(path: Path) -> str:
        return path.read_text(encoding="utf-8").strip()

    def remember_keys(self) -> None:
        """The private halves, as text and as bytes."""
        blocks = self.permit_key.read_bytes().split(b"-----END PRIVATE KEY-----\n")
        for number, block in enumerate(each for each in blocks if b"BEGIN PRIVATE" in each):
            pem = block[block.index(b"-----BEGIN") :] + b"-----END PRIVATE KEY-----\n"
            key = serialization.load_pem_private_key(pem, None)
            raw = key.private_bytes(
                serialization.Encoding.Raw,
                serialization.PrivateFormat.Raw,
                serialization.NoEncryption(),
            )
            self.planted.add(f"permit key {number}", raw)

    def sidecar(self, url: str) -> SidecarProcess:
        issuer = {
            "issuer": IDP.issuer,
            "audiences": [IDP.audience],
            "jwks_url": f"{url}/jwks.json",
            "bearer_token_file": str(self.keys),
        }
        bundle = {"url": f"{url}/bundle.tar.gz", "bearer_token_file": str(self.bundles)}
        config: dict[str, Any] = {
            "identity": {"mode": "jwt", "issuers": [issuer]},
            "policy": {"bundles": {"main": {"http": {**bundle, "poll_seconds": 1}}}},
            "permit": {"key_file": str(self.permit_key)},
            "listen": {"metrics": "127.0.0.1:0"},
            "budget": {
                "store": {"unix": str(self.redis.socket), "password_file": str(self.password)}
            },
        }
        user = self.given / "user"
        user.write_text("pdp\n", encoding="utf-8")
        config["budget"]["store"]["username_file"] = str(user)
        environment = {
            "PYTHONASYNCIODEBUG": "1",
            "PYTHONFAULTHANDLER": "1",
            "TMPDIR": str(self.temporary),
        }
        return SidecarProcess(
            self.home, issuer=IDP, bundle=self.served / "bundle.tar.gz", config=config,
            environment=environment,
        )  # fmt: skip

    def token(self, tenant: str = "tenant_acme", **claims: Any) -> str:
        made = IDP.token(
            tenant,
            f"user-{len(self.planted.secrets)}",
            roles=["support_agent", "agent"],
            scopes=["orders:read", "orders:write", "mail:send"],
            jti=str(uuid.uuid4()),
            **claims,
        )
        return self.planted.add(f"token {len(self.planted.secrets)}", made)

    def permit(self, permit: Permit) -> Permit:
        self.planted.add(f"permit {len(self.planted.secrets)}", permit.token)
        return permit

    def hear(self, call: Callable[[], object]) -> None:
        """Make a call, and keep whatever is said of it: text, repr, and the whole traceback."""
        try:
            said = call()
        except Exception as error:  # noqa: BLE001 - of whatever kind
            self.said += [str(error), repr(error), "".join(traceback.format_exception(error))]
        else:
            self.said += [str(said), repr(said)]

    def command(self, *words: str) -> int:
        """Run a command of the operators', and keep what it says; its exit code."""
        ran = subprocess.run(
            [sys.executable, "-m", "pdp", *words],
            capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )  # fmt: skip
        self.said += [ran.stdout, ran.stderr]
        return ran.returncode

    def leaks(self) -> list[str]:
        """Every place, looked at now."""
        folders = [self.home, self.temporary]
        found = self.planted.in_files(folders, but=[self.permit_key])
        for said in self.said:
            found += self.planted.in_text(f"what was said, {said[:200]!r},", said.encode())
        return found


def test_no_secret_is_left_anywhere_by_a_whole_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    world = World(tmp_path)
    world.redis.start()
    tokens = (world.read(world.keys), world.read(world.bundles))
    try:
        with ChildrenSeen() as seen, places(world.served, *tokens) as url:
            with world.sidecar(url) as sidecar:
                assert sidecar.process is not None
                seen.below(sidecar.process.pid)
                calls(world, sidecar)
                agents_and_servers(world, sidecar)
                operators(world, sidecar)
                faults(world, sidecar)
                metrics = f"{http_of(sidecar)}/metrics"
                with urllib.request.urlopen(metrics, timeout=5) as answer:  # noqa: S310 - loopback
                    world.said.append(answer.read().decode())
                left = world.leaks()
                assert left == [], left  # with write-ahead logs and temporary files still there
                crash(sidecar)
                assert b"Fatal Python error: Aborted" in sidecar.log.read_bytes()
                sidecar.start()
                assert sidecar.terminate() == 0
            another_engine(world, url)
    finally:
        world.redis.stop()
    assert any(b"pdp\0serve" in command for command in seen.commands)
    assert any(b"pdp.policy.preparation" in command for command in seen.commands)
    found = world.leaks()
    found += world.planted.in_text("/proc", b"\n".join(seen.texts))
    found += world.planted.in_text("what was logged", caplog.text.encode())
    assert found == [], found
    assert {mode for _, mode in modes(sidecar.state)} <= {"0o600", "0o700"}


def another_engine(world: World, url: str) -> None:
    """An OPA server that does not take the token, and says so with it in its answer."""
    token = world.secret_file("opa", "the token for OPA")
    folder = world.home / "opa"
    folder.mkdir()
    sidecar = SidecarProcess(
        folder,
        issuer=IDP,
        bundle=world.served / "bundle.tar.gz",
        config={"policy": {"engine": {"opa": {"url": url, "token_file": str(token)}}}},
        environment={"TMPDIR": str(world.temporary)},
    )
    with sidecar, Caller(sidecar.target, token=world.token()) as caller:
        answer = caller.authorize("orders.read", {"order_id": "1"})
        assert (answer.decision, answer.reason_code) == (False, "policy_unavailable")
        world.said.append(str(answer))


def modes(folder: Path) -> Iterator[tuple[str, str]]:
    for path in (folder, *folder.rglob("*")):
        yield path.name, oct(stat.S_IMODE(path.stat().st_mode))


def calls(world: World, sidecar: SidecarProcess) -> None:
    """Allowed, denied, malformed, forged; a handler that raises; a budget that is spent."""
    bearer = world.token()
    with Guard(sidecar.target, timeout_seconds=20) as guard:

        @guard.tool("orders.update")
        def update(order_id: str, status: str) -> None:
            world.permit(current_permit())
            raise LookupError(MARK)

        @guard.tool("mail.send")
        def send(to: str, subject: str, body: str) -> str:
            world.permit(current_permit())
            return MARK

        with guard.acting_for(bearer, context={"note": MARK}):
            with pytest.raises(LookupError):  # the tool's own, as it was raised
                update(**SHIPPED)
            assert send(to="kim@customers.example", subject=MARK, body=MARK) == MARK
            world.hear(lambda: update(order_id=MARK, status="shipped"))
            world.hear(lambda: guard.authorize("orders.read", {"order_id": MARK, MARK: 1}))
            world.hear(guard.tools)
            with guard.reserve([("llm", "usd_micros", 5)]) as hold:
                world.hear(lambda: hold)
            world.hear(lambda: guard)
        for forged in (bearer[:-6] + "AAAAAA", f"{bearer}.{MARK}", MARK, "eyJ.eyJ.eyJ"):
            with guard.acting_for(forged):
                world.hear(lambda: update(**SHIPPED))
    with Caller(sidecar.target, token=bearer) as caller:
        for bad in (f'{{"a":"{MARK}', f'{{"{MARK}":1,"{MARK}":2}}', f'["{MARK}"]'):
            request = authorization_pb2.AuthorizeRequest(
                request_id="bad",
                action=authorization_pb2.Action(name="orders.read"),
                arguments_json=bad.encode(),
            )
            world.said.append(str(refusal_of(caller.authorization.Authorize, request)))
        for name in (MARK, f"{MARK} with a space"):
            world.hear(lambda name=name: caller.authorize(name).reason_code)  # type: ignore[misc]
        charge = budget_pb2.ChargeBudgetRequest(
            idempotency_key=MARK, charges=[common_pb2.Charge(budget=MARK, unit="x", amount=1)]
        )
        world.said.append(str(refusal_of(caller.budget.ChargeBudget, charge)))
    metadata = [("traceparent", MARK), ("x-secret", MARK)]
    with Caller(sidecar.target, token=world.token(), metadata=metadata) as caller:
        answer = caller.authorize("orders.update", SHIPPED)
        world.planted.add("a permit", answer.permit)
        wrong = execution_pb2.RedeemPermitRequest(
            permit=answer.permit,
            idempotency_key=str(uuid.uuid4()),
            tool="orders.delete",
            arguments_sha256="0" * 64,
            audience="tools",
        )
        world.said.append(str(refusal_of(caller.execution.RedeemPermit, wrong)))


def agents_and_servers(world: World, sidecar: SidecarProcess) -> None:
    """Delegations of two generations, wider ones, batches, and MCP servers behind doors."""
    with Guard(sidecar.target, timeout_seconds=20) as guard:
        with guard.acting_for(world.token()):
            rules = {"orders.update": {"status": {"one_of": ["shipped", MARK]}}}
            parent = guard.delegate("planner", tools=["orders.update"], arguments=rules)
            world.hear(lambda: guard.delegate(MARK, tools=[MARK]))
        world.planted.add("a delegation", parent.token)
        with guard.accept(parent.metadata()):
            child = guard.delegate("worker", tools=["orders.update"])
            world.hear(lambda: guard.delegate("worker", tools=["mail.send"]))
        world.planted.add("a child's delegation", child.token)
        with guard.accept(child.metadata()):
            permit = world.permit(guard.authorize("orders.update", dict(SHIPPED)))
            world.hear(lambda: guard.authorize("orders.update", {**SHIPPED, "status": MARK}))
        for shown in (parent, child, permit, guard):
            world.hear(lambda shown=shown: shown)  # type: ignore[misc]
        world.hear(lambda: guard.acting_for(child.token))
        with door_of(sidecar.target) as door:
            arguments: dict[str, Any] = {**SHIPPED, "order_id": MARK}
            world.hear(lambda: door.admit(permit.token, tool="orders.update", arguments=arguments))
            world.hear(lambda: door.admit(permit.token[:-4], tool="x", arguments={}))
            with pytest.raises(PermitError):
                door.admit(parent.token, tool="orders.update", arguments=dict(SHIPPED))

    async def ask(kind: str) -> list[str]:
        with serving(sidecar.target, kind) as (connect, _):
            async with AsyncGuard(sidecar.target, timeout_seconds=20) as guard, connect() as client:
                with guard.acting_for(world.token("tenant_globex")):
                    permit = world.permit(await guard.authorize("orders.update", dict(SHIPPED)))
                return [
                    await told(client, permit.token, {**SHIPPED, "order_id": MARK}),
                    await told(client, permit.token[:-4] + "AAAA"),
                    await told(client, permit.token),
                    await told(client, permit.token),
                ]

    for kind in ("sdk", "fastmcp"):
        answers = asyncio.run(ask(kind))
        assert answers[1:] == ["permit_invalid", "918 of tenant_globex", "permit_used"]
        world.said += answers


def operators(world: World, sidecar: SidecarProcess) -> None:
    """Another release, another signing key, revocations, every command that shows something."""
    config = ("--config", str(sidecar.config_file))
    revision = write_bundle(world.served / "bundle.tar.gz", release=2)
    with Caller(sidecar.target, token=world.token()) as caller:
        read = {"order_id": "918"}
        assert soon(lambda: caller.authorize("orders.read", read).policy_revision == revision)
    log = str(sidecar.state / "audit")
    for words in (
        ("status", "--url", http_of(sidecar)),
        ("keys", "list", *config),
        ("keys", "rotate", "--overlap-seconds", "1", *config),
        ("revoke", "actor", "tenant_acme", "somebody", "--reason", "left", *config),
        ("revoke", "list", *config),
        ("budget", "show", "tenant_acme", *config),
        ("budget", "holds", "tenant_acme", *config),
        ("config", "check", str(sidecar.config_file)),
        ("audit", "verify", log),
        ("audit", "tail", log),
    ):
        assert world.command(*words) in {0, 1}, words
    world.remember_keys()


def faults(world: World, sidecar: SidecarProcess) -> None:
    """The store is away, and back; a source refuses; configurations that are wrong."""
    bearer = world.token()
    world.redis.kill()
    with Caller(sidecar.target, token=bearer) as caller:
        world.said.append(str(refusal_of(caller.authorize, "orders.update", SHIPPED)))
        world.redis.start()
        assert soon(lambda: caller.authorize("orders.read", {"order_id": "1"}).decision)
    right = world.bundles.read_text(encoding="utf-8")
    world.bundles.write_text(world.planted.add("a bearer that is refused", f"wrong-{uuid.uuid4()}"))
    shown = ("status", "--url", http_of(sidecar))
    assert soon(lambda: world.command(*shown) >= 0 and "401" in world.said[-2])
    world.bundles.write_text(right, encoding="utf-8")
    inline = world.planted.add("a password in the wrong place", f"inline-{uuid.uuid4()}")
    wrong = world.given / "wrong.yaml"
    sections: tuple[dict[str, Any], ...] = (
        {"budget": {"store": {"unix": "/nowhere", "password": inline}}},
        {"budget": {"store": {"addresses": [f"pdp:{inline}@redis.example:6379"]}}},
        {"budget": {"store": f"redis://pdp:{inline}@redis.example"}},
        {"policy": {"bundles": {"main": {"http": {"url": f"https://u:{inline}@b.example/b"}}}}},
        {"policy": {"engine": {"opa": {"url": f"https://u:{inline}@opa.example"}}}},
        {"policy": {"engine": {"opa": {"token": inline}}}},
        {"permit": {"key_file": {"inline": inline}}},
        {"permit": {"key": inline}},
        {"identity": {"mode": "jwt", "issuers": [{"issuer": f"https://u:{inline}@id.example"}]}},
        {"identity": {"mode": inline}},
    )
    for section in sections:
        wrong.write_text(json.dumps({"state_dir": str(world.home), **section}), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(wrong, {})
        world.said += [str(caught.value), repr(caught.value)]
    for words in (("config", "check", str(wrong)), ("serve", "--config", str(wrong))):
        assert world.command(*words) == 2


def crash(sidecar: SidecarProcess) -> None:
    """End it in the middle of calls, with a traceback of every thread."""
    assert sidecar.process is not None
    sidecar.process.send_signal(signal.SIGABRT)
    sidecar.process.wait(20)


def http_of(sidecar: SidecarProcess) -> str:
    address = sidecar.log.read_text(encoding="utf-8").split("http://")[1].split(" ")[0]
    return f"http://{address}"


def test_every_spelling_of_a_secret_is_found() -> None:
    import base64  # noqa: PLC0415
    import urllib.parse  # noqa: PLC0415

    planted = Planted()
    planted.add("it", MARK)
    jwt = planted.add("token", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLW9m")
    for text in (
        MARK.encode(),
        MARK.encode().hex().encode(),
        urllib.parse.quote(MARK, safe="").encode(),
        *(base64.b64encode(b"x" * before + MARK.encode() + b"y" * 5) for before in range(7)),
        *(base64.urlsafe_b64encode(b"x" * before + MARK.encode()) for before in range(4)),
    ):
        assert planted.in_text("here", b"before " + text + b" after") == ["here holds it"]
    assert planted.in_text("here", jwt.split(".")[1].encode()) == ["here holds token, its payload"]
    assert planted.in_text("here", b"nothing of the sort") == []
    assert len(set(spellings(MARK.encode()))) > 6
