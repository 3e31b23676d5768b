"""Same bundle, same input: the embedded engine and a real OPA give the same decision."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pdp.canonical import MAX_SAFE_INTEGER, JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.bundle import Bundle
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.question import authorize_input
from pdp.policy.verdict import parse_verdict
from pdp.policy.wasm import WasmEngine

ROOT = Path(__file__).resolve().parent.parent.parent
UNDEFINED = "undefined"
FAILED = "failed"

Ask = Callable[[Entrypoint, JsonObject], JsonValue]


def question(subject: dict[str, Any], *, tool: str, arguments: JsonObject) -> JsonObject:
    return authorize_input(
        Subject(
            tenant=subject["tenant"],
            actor="alice",
            roles=tuple(subject["roles"]),
            scopes=tuple(subject["scopes"]),
        ),
        tool=tool,
        arguments=arguments,
        resource=None,
        time=0,
        request_id="req-1",
        context={},
    )


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


@pytest.fixture(scope="module")
def embedded(starter: Bundle) -> Iterator[Ask]:
    engine = WasmEngine(starter, deadline_ms=5_000, workers=1, memory_max_mib=64)
    with asyncio.Runner() as runner:

        def ask(entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
            try:
                return runner.run(engine.evaluate(entrypoint, document))
            except PolicyError as error:
                return UNDEFINED if error.reason_code == "policy_undefined" else FAILED

        yield ask
        runner.run(engine.close())


@pytest.fixture(scope="module")
def served(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """OPA itself, on the sources: it can not run a bundle that holds Wasm."""
    path = str(tmp_path_factory.mktemp("socket") / "opa")
    command: list[str | Path] = [opa, "run", "--server", "--addr", f"unix://{path}"]
    command += ["--log-level", "error", "--skip-version-check", "--ignore", "*_test.rego"]
    command += ["--bundle", ROOT / "policies"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        connection = UnixConnection(path)
        try:
            wait_until_served(process, connection)

            def ask(entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
                body = json.dumps({"input": document}, ensure_ascii=False).encode()
                connection.request("POST", f"/v1/data/{entrypoint.value}", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != http.client.OK:
                    return FAILED
                return answer.get("result", UNDEFINED)  # type: ignore[no-any-return]

            yield ask
        finally:
            connection.close()
            process.terminate()


def wait_until_served(process: subprocess.Popen[bytes], connection: UnixConnection) -> None:
    for _ in range(500):
        try:
            connection.request("GET", "/health?bundles")
            response = connection.getresponse()
            response.read()
        except OSError:
            connection.close()
        else:
            if response.status == http.client.OK:
                return
        assert process.poll() is None, "opa has ended"
        threading.Event().wait(0.02)
    pytest.fail("opa did not come up within 10 s")


argument_names = st.sampled_from(
    ("order_id", "status", "to", "subject", "body", "topic", "pages", "tenant_id", "")
)
plain_values = (
    st.none()
    | st.booleans()
    | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-2, 22)
    | st.text(max_size=20)
    | st.from_regex(r"[0-9]{1,13}\n?", fullmatch=True)
    | st.from_regex(r"[a-z]{1,3}@(customers[.]example|CUSTOMERS[.]Example|evil[.]example)\n?")
    | st.sampled_from(
        ("shipped", "Shipped", "refunded", "\u0130", "\u212a", "\x00", "\x7f", "\ud7ff")
    )
)
argument_values: st.SearchStrategy[Any] = (
    plain_values | st.lists(plain_values, max_size=2) | st.just({})
)
subjects = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(("tenant_acme", "tenant_globex", "tenant_initech", "nobody")),
        "roles": st.lists(
            st.sampled_from(("support_agent", "analyst", "viewer", "agent", "nobody")), max_size=3
        ),
        "scopes": st.lists(
            st.sampled_from(("orders:read", "orders:write", "mail:send", "reports:generate")),
            max_size=4,
        ),
    }
)
EVERYTHING = {
    "tenant": "tenant_acme",
    "roles": ["support_agent", "analyst"],
    "scopes": ["orders:read", "orders:write", "mail:send", "reports:generate"],
}
MAIL = {"to": "kim@customers.example", "subject": "Hello", "body": "Hello."}


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    subject=subjects | st.just(EVERYTHING),
    tool=st.sampled_from(("orders.read", "orders.update", "mail.send", "reports.generate", "no")),
    arguments=st.dictionaries(argument_names, argument_values, max_size=4),
)
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 1e300})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 5e-324})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 1.0000000000000002})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 20.000000000000004})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": -0.0})
@example(EVERYTHING, "reports.generate", {"topic": "\U0001f600" * 200})
@example(EVERYTHING, "reports.generate", {"topic": "\U0001f600" * 201})
@example(EVERYTHING, "reports.generate", {"topic": "e\u0301" * 101})
@example(EVERYTHING, "mail.send", {**MAIL, "subject": "\u2028\u0085"})
@example(EVERYTHING, "mail.send", {**MAIL, "subject": "\x80\x9f"})
@example(EVERYTHING, "mail.send", {**MAIL, "subject": "a\x00b"})
@example(EVERYTHING, "mail.send", {**MAIL, "to": "kim@customers.example\n"})
@example(EVERYTHING, "mail.send", {**MAIL, "body": "\x00" * 10_000})
def test_both_engines_decide_alike_whatever_is_asked(
    embedded: Ask, served: Ask, subject: dict[str, Any], tool: str, arguments: JsonObject
) -> None:
    document = question(subject, tool=tool, arguments=arguments)

    decision = embedded(Entrypoint.AUTHZ_DECISION, document)

    assert decision == served(Entrypoint.AUTHZ_DECISION, document)
    parse_verdict(decision)
