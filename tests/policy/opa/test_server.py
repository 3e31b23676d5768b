"""An OPA server that runs already: what it answers oddly is a denial."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.bundle import assemble, read_part
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.opa import client
from pdp.policy.opa.client import revision_of
from pdp.policy.opa.server import MAX_CONNECTIONS, OpaEngine
from tests.policy.opa.servers import answering, served, until

ROOT: Final = Path(__file__).resolve().parents[3]
HUSH: Final = "hush-4711"
AUTHZ: Final = "package pdp.authz\ndecision := input.echo\n"
R1: Final[JsonObject] = {"bundles": {"main": {"revision": "r-1"}}}
R2: Final[JsonObject] = {"bundles": {"main": {"revision": "r-2"}}}


@asynccontextmanager
async def engine_at(
    url: str, *, token_file: Path | None = None, deadline_ms: int = 5_000
) -> AsyncIterator[OpaEngine]:
    engine = OpaEngine(url, token_file=token_file, deadline_ms=deadline_ms)
    try:
        yield engine
    finally:
        await engine.close()


async def asked(engine: OpaEngine, document: JsonObject | None = None) -> JsonValue:
    with engine.pin() as policy:
        return await policy.evaluate(Entrypoint.AUTHZ_DECISION, document or {})


async def refusal(engine: OpaEngine, document: JsonObject | None = None) -> str:
    with pytest.raises(PolicyError) as refused:
        await asked(engine, document)
    assert HUSH not in f"{refused.value} {refused.value!r}"
    assert refused.value.__cause__ is None
    return refused.value.reason_code


def reply(body: Any, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=body if isinstance(body, bytes) else json.dumps(body).encode(),
        content_type="application/json",
    )


def failure(code: str, *, error: str) -> JsonObject:
    return {"code": code, "message": HUSH, "errors": [{"code": error, "message": HUSH}]}


@pytest.mark.parametrize(
    ("answer", "reason_code"),
    (
        (reply({}), "policy_undefined"),
        (reply({"provenance": R1, "warning": {"code": "api_usage_warning"}}), "policy_undefined"),
        (reply(failure("internal_error", error="eval_builtin_error"), 500), "policy_error"),
        (reply(failure("internal_error", error="eval_conflict_error"), 500), "policy_error"),
        (reply(failure("invalid_parameter", error="eval_type_error"), 400), "policy_error"),
        (reply({"code": "internal_error", "message": HUSH}, 500), "policy_error"),
        (reply({"code": "invalid_parameter", "message": HUSH}, 400), "policy_error"),
        (reply({"code": "something_else", "message": HUSH}, 500), "policy_unavailable"),
        (reply({"code": ["internal_error"]}, 500), "policy_unavailable"),
        (reply({"error": "internal_error"}, 500), "policy_unavailable"),
        (reply([], 500), "policy_unavailable"),
        (reply(b"<html>" + HUSH.encode(), 500), "policy_unavailable"),
        (reply({"result": True}, 201), "policy_unavailable"),
        (reply({"result": True}, 203), "policy_unavailable"),
        (reply({"code": "unauthorized"}, 401), "policy_unavailable"),
        (reply({"code": "not_found"}, 404), "policy_unavailable"),
        (reply({"result": True}, 502), "policy_unavailable"),
        (reply({"result": True}, 503), "policy_unavailable"),
        (reply(b""), "policy_unavailable"),
        (reply(HUSH.encode()), "policy_unavailable"),
        (reply(b'{"result": tru'), "policy_unavailable"),
        (reply(b'{"result": NaN}'), "policy_unavailable"),
        (reply(b'{"result": "\xff"}'), "policy_unavailable"),
        (reply(b'{"result": 1e400}'), "policy_error"),
        (reply(b'{"result": ' + b"1" * 5_000 + b"}"), "policy_error"),
        (reply(b'{"result": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "policy_error"),
        (reply([{"result": True}]), "policy_unavailable"),
        (reply("result"), "policy_unavailable"),
        (reply(b"null"), "policy_unavailable"),
        (reply({"result": "x" * 2**20}), "policy_error"),
        (reply({"errors": "x" * 2**20}, 500), "policy_unavailable"),
    ),
)
def test_an_odd_answer_is_a_denial_with_its_own_code(
    answer: web.Response, reason_code: str
) -> None:
    body, status = answer.body, answer.status

    async def handle(_: web.Request) -> web.StreamResponse:
        return reply(body, status)

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            assert await refusal(engine) == reason_code

    asyncio.run(run())


@pytest.mark.parametrize("value", (None, False, 0, "", [], {}, 9007199254740993, 1.5, {"a": [1]}))
def test_a_value_comes_back_as_it_is(value: JsonValue) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return reply({"result": value})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            answer = await asked(engine)
            assert answer == value
            assert type(answer) is type(value)

    asyncio.run(run())


def test_a_broken_connection_and_none_at_all_are_a_denial() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            assert await refusal(engine) == "policy_unavailable"
        async with engine_at(url) as engine:
            assert await refusal(engine) == "policy_unavailable"
            assert not await engine.healthy()

    asyncio.run(run())


def test_an_answer_that_stops_half_way_is_too_slow_and_its_rest_is_nobodys() -> None:
    questions = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal questions
        questions += 1
        if questions > 1:
            return reply({"result": "second"})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"result": ')
        await asyncio.Event().wait()
        return response

    async def run() -> None:
        async with answering(handle) as url, engine_at(url, deadline_ms=50) as engine:
            assert await refusal(engine) == "policy_timeout"
            assert await asked(engine) == "second"

    asyncio.run(run())


def test_a_call_that_is_cancelled_leaves_no_reply_for_the_next() -> None:
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        document = (await request.json())["input"]
        if document["call"] == 1:
            arrived.set()
            await answer.wait()
        return reply({"result": document["call"]})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            first = asyncio.create_task(asked(engine, {"call": 1}))
            await arrived.wait()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            answer.set()
            assert [await asked(engine, {"call": n}) for n in (2, 3, 4)] == [2, 3, 4]

    asyncio.run(run())


def test_many_calls_at_once_each_get_their_own_answer_also_when_others_give_up() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        number = (await request.json())["input"]["call"]
        await asyncio.sleep(number % 7 / 1000)
        return reply({"result": number})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            calls = [asyncio.create_task(asked(engine, {"call": n})) for n in range(300)]
            await asyncio.sleep(0.01)
            for call in calls[::3]:
                call.cancel()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            for number, got in enumerate(answers):
                assert got == number or (number % 3 == 0 and isinstance(got, BaseException))

    asyncio.run(run())


def test_connections_are_kept() -> None:
    peers = set()

    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return reply({"result": True})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            for _ in range(20):
                await asked(engine)

    asyncio.run(run())
    assert len(peers) == 1


def test_the_server_gets_a_bounded_number_of_questions_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "MAX_WAITING", 10)
    under_way, most, answer = 0, 0, asyncio.Event()

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await answer.wait()
        under_way -= 1
        return reply({"result": True})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            calls = [asyncio.create_task(asked(engine)) for _ in range(MAX_CONNECTIONS + 10)]

            async def full() -> bool:
                return under_way == MAX_CONNECTIONS

            await until(full)
            assert await refusal(engine) == "policy_unavailable"
            answer.set()
            assert await asyncio.gather(*calls) == [True] * len(calls)

    asyncio.run(run())
    assert most == MAX_CONNECTIONS


def test_a_question_does_not_wait_for_its_turn_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_WAIT_SECONDS", 0.05)

    async def handle(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return reply({})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url, deadline_ms=10_000) as engine:
            calls = [asyncio.create_task(asked(engine)) for _ in range(MAX_CONNECTIONS)]
            await asyncio.sleep(0)
            assert await refusal(engine) == "policy_unavailable"
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(run())


def test_the_token_is_read_anew_and_follows_no_redirect(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    seen: list[tuple[str, str | None]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append((request.path, request.headers.get("Authorization")))
        if len(seen) > 2:
            raise web.HTTPTemporaryRedirect("/elsewhere")
        return reply({"result": True})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url, token_file=token_file) as engine:
            assert await refusal(engine) == "policy_unavailable", "there is no file"
            for token in ("one\n", "two\n"):
                token_file.write_text(token)
                await asked(engine)
            assert await refusal(engine) == "policy_unavailable"
            token_file.write_text("a\nb")
            assert await refusal(engine) == "policy_unavailable"

    asyncio.run(run())
    path = "/v1/data/pdp/authz/decision"
    assert seen == [(path, "Bearer one"), (path, "Bearer two"), (path, "Bearer two")]


def test_all_answers_of_one_call_follow_from_one_revision() -> None:
    provenances = iter([R1, R1, R2, R2])

    async def handle(_: web.Request) -> web.StreamResponse:
        return reply({"result": [], "provenance": next(provenances)})

    async def run() -> None:
        async with answering(handle) as url, engine_at(url) as engine:
            assert engine.revision == "unknown"
            changed = asyncio.create_task(engine.changed_from("r-1"))
            with engine.pin() as first, engine.pin() as second:
                await first.evaluate(Entrypoint.AUTHZ_DECISION, {})
                await first.evaluate(Entrypoint.BUDGET_LIMITS, {})
                await second.evaluate(Entrypoint.AUTHZ_DECISION, {})
                with pytest.raises(PolicyError) as refused:
                    await first.evaluate(Entrypoint.BUDGET_LIMITS, {})
            assert refused.value.reason_code == "policy_unavailable"
            assert (first.revision, second.revision, engine.revision) == ("r-1", "r-2", "r-2")
            assert await changed in {"unknown", "r-2"}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("provenance", "revision"),
    (
        (None, "unknown"),
        ([], "unknown"),
        ({"version": "1.22.2"}, "unknown"),
        ({"revision": "old-style"}, "old-style"),
        ({"bundles": {}}, "unknown"),
        ({"bundles": {"a": {"revision": ""}}}, "unknown"),
        ({"bundles": {"a": {"revision": 7}}}, "unknown"),
        ({"bundles": {"a": None}}, "unknown"),
        ({"bundles": {"a": {"revision": "r-1"}}}, "r-1"),
        ({"bundles": {"b": {"revision": "2"}, "a": {"revision": "1"}}}, "a=1,b=2"),
        ({"bundles": {"b": {"revision": "2"}, "a": {}}}, "a=unknown,b=2"),
    ),
)
def test_a_revision_names_every_bundle_and_what_is_unknown(
    provenance: JsonValue, revision: str
) -> None:
    assert revision_of(provenance) == revision


@pytest.mark.parametrize(
    "revisions",
    (
        {"rules": "1", "acme": "2"},
        {"rules": "1,acme=2", "acme": "2"},
        {"rules": "r" * 128, "acme": "2"},
        {f"b{number}": "r" * 20 for number in range(9)},
    ),
)
def test_several_bundles_have_the_revision_that_the_embedded_engine_gives_them(
    revisions: dict[str, str],
) -> None:
    parts = [
        read_part(
            {
                ".manifest": json.dumps({"revision": revision, "roots": [name]}).encode(),
                f"{name}/data.json": b"{}",
            },
            name=name,
            place=name,
            verifier=None,
        )
        for name, revision in revisions.items()
    ]
    provenance: JsonObject = {
        "bundles": {name: {"revision": revision} for name, revision in revisions.items()}
    }
    assert revision_of(provenance) == assemble(parts).revision


@pytest.mark.parametrize("revision", ("two words", "\u2603", "r" * 129, "a\nb"))
def test_a_revision_that_fits_no_record_is_named_by_its_digest(revision: str) -> None:
    assert revision_of({"bundles": {"a": {"revision": revision}}}).startswith("sha256:")


def test_it_is_healthy_only_when_it_has_its_bundles_and_answers() -> None:
    health, data = 503, reply({"result": True})

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            assert "bundles" in request.query
            return reply({}, health)
        return reply(data.body, data.status)

    async def run() -> None:
        nonlocal health, data
        async with answering(handle) as url, engine_at(url) as engine:
            assert not await engine.healthy()
            health = 200
            assert await engine.healthy()
            data = reply(failure("internal_error", error="eval_conflict_error"), 500)
            assert await engine.healthy(), "of the policy's making"
            data = reply({"code": "unauthorized"}, 401)
            assert not await engine.healthy()

    asyncio.run(run())


def test_a_closed_engine_refuses() -> None:
    async def run() -> None:
        async with engine_at("http://127.0.0.1:9") as engine:
            pass
        assert await refusal(engine) == "policy_unavailable"
        assert not await engine.healthy()

    asyncio.run(run())


def certified(directory: Path) -> ssl.SSLContext:
    """A server's TLS, with a certificate that nobody but itself vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "opa")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    file = directory / "opa.pem"
    file.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + certificate.public_bytes(Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


def test_a_server_that_nobody_vouches_for_gets_no_question(tmp_path: Path) -> None:
    asked_it = False

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal asked_it
        asked_it = True
        return reply({"result": True})

    async def run() -> None:
        async with answering(handle, tls=certified(tmp_path)) as url, engine_at(url) as engine:
            assert await refusal(engine) == "policy_unavailable"
            assert not await engine.healthy()

    asyncio.run(run())
    assert not asked_it


# And the real one.


def write_bundle(directory: Path, revision: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "authz.rego").write_text(AUTHZ)
    (directory / ".manifest").write_text(json.dumps({"revision": revision, "roots": ["pdp"]}))


Turn = Callable[[OpaEngine], Awaitable[None]]


def with_real(opa: Path, turn: Turn, *arguments: str | Path, **options: Any) -> None:
    async def run(url: str) -> None:
        async with engine_at(url, **options) as engine:
            await turn(engine)

    with served(opa, *arguments) as url:
        asyncio.run(run(url))


def test_a_real_opa_answers_and_names_its_revision(opa: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "r-1")

    async def turn(engine: OpaEngine) -> None:
        assert await engine.healthy()
        assert engine.revision == "r-1"
        assert await asked(engine, {"echo": [9007199254740993, 0.1, "\u2028"]}) == [
            9007199254740993,
            0.1,
            "\u2028",
        ]
        assert await refusal(engine, {"other": HUSH}) == "policy_undefined"

    with_real(opa, turn, "--bundle", tmp_path / "bundle")


def test_a_new_bundle_of_a_real_opa_is_noticed(opa: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "r-1")

    async def turn(engine: OpaEngine) -> None:
        assert await engine.healthy()
        changed = asyncio.create_task(engine.changed_from("r-1"))
        with engine.pin() as policy:
            await policy.evaluate(Entrypoint.AUTHZ_DECISION, {"echo": 1})
            write_bundle(tmp_path / "bundle", "r-2")

            async def taken_up() -> bool:
                return await engine.healthy() and engine.revision == "r-2"

            await until(taken_up)
            assert await changed == "r-2"
            with pytest.raises(PolicyError) as refused:
                await policy.evaluate(Entrypoint.AUTHZ_DECISION, {"echo": 1})
        assert refused.value.reason_code == "policy_unavailable"
        assert policy.revision == "r-1"

    with_real(opa, turn, "--watch", "--bundle", tmp_path / "bundle")


def test_a_real_opa_that_wants_a_token_gets_it(opa: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "r-1")
    guard = tmp_path / "guard.rego"
    guard.write_text(
        "package system.authz\ndefault allow := false\n"
        'allow if input.identity == "right"\nallow if input.path == ["health"]\n'
    )
    (tmp_path / "bundle" / "guard.rego").write_text(guard.read_text())
    (tmp_path / "bundle" / ".manifest").write_text('{"revision": "r-1"}')
    token_file = tmp_path / "token"
    token_file.write_text("wrong\n")

    async def turn(engine: OpaEngine) -> None:
        assert await refusal(engine, {"echo": 1}) == "policy_unavailable"
        assert not await engine.healthy()
        token_file.write_text("right\n")
        assert await asked(engine, {"echo": 1}) == 1
        assert await engine.healthy()

    with_real(
        opa, turn, "--authentication=token", "--authorization=basic", "--bundle",
        tmp_path / "bundle", token_file=token_file,
    )  # fmt: skip
