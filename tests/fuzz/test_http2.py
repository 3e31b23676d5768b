"""Whoever misuses HTTP/2 neither stops nor fills the sidecar: others are answered meanwhile, and
what it took is given back.
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle
from tests.fuzz.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    LAST_REMEMBERED,
    PREFACE,
    Connection,
    Kind,
    Setting,
    frame,
    headers,
    message,
    remembered,
    settings,
)

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
TOKEN = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
"""Of the attacker, who may ask."""
OTHERS_TOKEN = ISSUER.token("tenant_globex", "user-8", roles=["agent"])
AUTHORIZE = "/pdp.v1.AuthorizationService/Authorize"
KEYS = "/pdp.v1.ExecutionService/GetPermitKeys"
MIB = 1024 * 1024

MOST_SECONDS_FOR_OTHERS = 5.0
"""For one call of somebody else. Generous, as machines of tests are busy; an attack that works
takes all there is."""
MOST_MORE_MEMORY = 192 * MIB
"""In the sidecar, after an attack."""
MOST_MORE_DESCRIPTORS = 4
SETTLES_SECONDS = 30.0

Attack = Callable[[str], None]
"""Says to the socket of that path whatever it has to say."""


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("http2")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    config = {"limits": {"tenants": {"calls_per_second": 100_000}}}
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        with Caller(process.target, token=OTHERS_TOKEN) as warm:
            for _ in range(50):
                warm.authorize("orders.read")
        yield process
        assert process.process is not None
        assert process.process.poll() is None, "the sidecar died of it"
        log = process.log.read_bytes()
        assert b" failed with " not in log
        assert TOKEN.encode() not in log


def rapid_reset(path: str) -> None:
    """CVE-2023-44487."""
    block = headers(AUTHORIZE, token=TOKEN)
    with Connection(path) as client:
        for stream in range(1, 20_001, 2):
            client.say(
                frame(Kind.HEADERS, block, flags=END_HEADERS, stream=stream),
                frame(Kind.RST_STREAM, struct.pack(">I", 8), stream=stream),
            )


def reset_by_the_server(path: str) -> None:
    """MadeYouReset, CVE-2025-8671: the client has the server reset, by what it may not do."""
    block = headers(AUTHORIZE, token=TOKEN)
    with Connection(path) as client:
        for stream in range(1, 20_001, 2):
            client.say(
                frame(Kind.HEADERS, block, flags=END_HEADERS, stream=stream),
                frame(Kind.WINDOW_UPDATE, struct.pack(">I", 0), stream=stream),
            )


def continuation_flood(path: str) -> None:
    """CVE-2024-27316 and its kin: headers without an end."""
    with Connection(path) as client:
        client.say(frame(Kind.HEADERS, headers(AUTHORIZE), stream=1))
        piece = headers("/", more=[(b"x-%d" % number, b"y" * 100) for number in range(100)])
        for _ in range(5_000):
            if not client.say(frame(Kind.CONTINUATION, piece, stream=1)):
                break


def empty_continuations(path: str) -> None:
    with Connection(path) as client:
        client.say(frame(Kind.HEADERS, headers(AUTHORIZE), stream=1))
        for _ in range(200):
            if not client.say(frame(Kind.CONTINUATION, stream=1) * 1_000):
                break


def settings_flood(path: str) -> None:
    """CVE-2019-9515: each asks for an answer, and none is read."""
    with Connection(path) as client:
        for _ in range(200):
            if not client.say(settings([(Setting.HEADER_TABLE_SIZE, 4096)]) * 500):
                break


def ping_flood(path: str) -> None:
    """CVE-2019-9512."""
    with Connection(path) as client:
        for _ in range(200):
            if not client.say(frame(Kind.PING, b"12345678") * 500):
                break


def reset_flood(path: str) -> None:
    """CVE-2019-9514: streams whose headers are wrong, each to be answered by a reset."""
    with Connection(path) as client:
        for stream in range(1, 20_001, 2):
            block = b"\0\x07:method\x04POST"
            if not client.say(frame(Kind.HEADERS, block, flags=END_HEADERS, stream=stream)):
                break


def priority_flood(path: str) -> None:
    """CVE-2019-9513."""
    with Connection(path) as client:
        for _ in range(200):
            priorities = b"".join(
                frame(Kind.PRIORITY, struct.pack(">IB", 0, 16), stream=stream)
                for stream in range(1, 1_000, 2)
            )
            if not client.say(priorities):
                break


def empty_data_flood(path: str) -> None:
    """CVE-2019-9518."""
    with Connection(path) as client:
        block = headers(AUTHORIZE, token=TOKEN)
        client.say(frame(Kind.HEADERS, block, flags=END_HEADERS, stream=1))
        for _ in range(200):
            if not client.say(frame(Kind.DATA, stream=1) * 1_000):
                break


def unread_answers(path: str) -> None:
    """CVE-2019-9511 and 9517: answers are asked for, and no window is given for them."""
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(Connection(path, greets=False))
            client.say(PREFACE, settings([(Setting.INITIAL_WINDOW_SIZE, 0)]))
            for stream in range(1, 2_001, 2):
                client.say(
                    frame(Kind.HEADERS, headers(KEYS), flags=END_HEADERS, stream=stream),
                    frame(Kind.DATA, message(b""), flags=END_STREAM, stream=stream),
                )
        time.sleep(1)  # it lasts for a while


def header_bomb(path: str) -> None:
    """CVE-2016-6581: a field of 4 KB is kept once, and named by one byte again and again.

    gRPC refuses the call, and yet hands up to 16 MiB of its fields to Python, whatever
    grpc.max_metadata_size says (docs/security.md): 50 of them are what is held against here.
    """
    with Connection(path) as client:
        for stream in range(1, 101, 2):
            block = headers(AUTHORIZE) + remembered(b"x", b"y" * 4_000) + LAST_REMEMBERED * 12_000
            if not client.say(frame(Kind.HEADERS, block, flags=END_HEADERS, stream=stream)):
                break


def large_headers(path: str) -> None:
    for _ in range(20):
        with Connection(path) as client:
            block = headers(AUTHORIZE, more=[(b"x", b"y" * 4 * MIB)])
            client.say(frame(Kind.HEADERS, block[:16_384], stream=1))
            for start in range(16_384, len(block), 16_384):
                piece = frame(Kind.CONTINUATION, block[start : start + 16_384], stream=1)
                if not client.say(piece):
                    break


def half_asked_questions(path: str) -> None:
    """As many streams as may be, each waiting for a message that says it is 4 MB long."""
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(Connection(path))
            block = headers(AUTHORIZE, token=TOKEN)
            for stream in range(1, 4_001, 2):
                client.say(
                    frame(Kind.HEADERS, block, flags=END_HEADERS, stream=stream),
                    frame(Kind.DATA, struct.pack(">BI", 0, 4 * MIB) + b"x" * 20, stream=stream),
                )
        time.sleep(1)  # it lasts for a while


def idle_connections(path: str) -> None:
    """Silent ones, some after a greeting, and some in the middle of their headers."""
    with contextlib.ExitStack() as stack:
        for number in range(300):
            client = stack.enter_context(Connection(path, greets=number % 3 > 0))
            if number % 3 > 1:
                client.say(frame(Kind.HEADERS, headers(AUTHORIZE), stream=1))
        time.sleep(1)  # they last for a while


def noise(path: str) -> None:
    """Frames of any kind, size, stream and flags, and bytes that are none."""
    chance = random.Random(1)  # noqa: S311 - the same noise in every run
    for _ in range(300):
        with Connection(path, greets=chance.random() < 0.9) as client:
            for _ in range(chance.randrange(1, 20)):
                if chance.random() < 0.1:
                    piece = chance.randbytes(chance.randrange(100))
                else:
                    content = chance.choice(
                        [b"", headers(AUTHORIZE, token=TOKEN), chance.randbytes(8), b"\0" * 4]
                    )
                    piece = frame(
                        chance.choice([*Kind, 10, 200]),
                        content,
                        flags=chance.choice([0, ACK, END_HEADERS, END_HEADERS | END_STREAM, 0xFF]),
                        stream=chance.choice([0, 1, 2, 3, 2**31 - 1, 2**32 - 1]),
                    )
                if not client.say(piece):
                    break
            client.hear(0.01)


ATTACKS = (
    rapid_reset,
    reset_by_the_server,
    continuation_flood,
    empty_continuations,
    settings_flood,
    ping_flood,
    reset_flood,
    priority_flood,
    empty_data_flood,
    unread_answers,
    header_bomb,
    large_headers,
    half_asked_questions,
    idle_connections,
    noise,
)
FLOODS_OF_CALLS = {half_asked_questions}
"""More calls at once than gRPC keeps for a server that has not taken them up yet: it then ends
some, other callers' too (grpc.server.max_pending_requests). They are refused, and ask again."""


def test_a_peer_writes_no_line_into_the_log(sidecar: SidecarProcess) -> None:
    line = b"2026-11-25 00:00:00,000 INFO pdp.audit: all is well"
    with Connection(str(sidecar.socket)) as client:
        client.say(frame(Kind.GOAWAY, struct.pack(">II", 0, 2) + b"\n" + line + b"\n"))
        client.hear()
    with Caller(sidecar.target, token=OTHERS_TOKEN) as other:
        assert other.authorize("orders.read").decision
    assert line not in sidecar.log.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_others_are_answered_during_an_attack_and_what_it_took_is_given_back(
    sidecar: SidecarProcess, attack: Attack
) -> None:
    memory, descriptors = resident(sidecar), open_files(sidecar)
    attacking = threading.Thread(target=attack, args=(str(sidecar.socket),))
    seconds = MOST_SECONDS_FOR_OTHERS
    with Caller(sidecar.target, token=OTHERS_TOKEN, timeout_seconds=seconds) as other:
        eventually(lambda: is_answered(other))
        attacking.start()
        asked = answered = 0
        while attacking.is_alive() or asked < 10:
            asked += 1
            answered += is_answered(other)
        attacking.join()
        assert answered == asked or attack in FLOODS_OF_CALLS
        eventually(lambda: is_answered(other))
    with Caller(sidecar.target, token=OTHERS_TOKEN, timeout_seconds=seconds) as newcomer:
        assert newcomer.authorize("orders.read").decision
    eventually(lambda: open_files(sidecar) <= descriptors + MOST_MORE_DESCRIPTORS)
    eventually(lambda: resident(sidecar) <= memory + MOST_MORE_MEMORY)


def is_answered(caller: Caller) -> bool:
    """Whether a call is answered; if not, it is refused, and in time."""
    try:
        return caller.authorize("orders.read").decision
    except grpc.RpcError as error:
        if error.code() not in {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}:
            raise
        return False


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLES_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "what it took is not given back"
        time.sleep(0.05)


def resident(sidecar: SidecarProcess) -> int:
    """Bytes of memory that the sidecar holds."""
    assert sidecar.process is not None
    status = Path(f"/proc/{sidecar.process.pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def open_files(sidecar: SidecarProcess) -> int:
    assert sidecar.process is not None
    return sum(1 for _ in Path(f"/proc/{sidecar.process.pid}/fd").iterdir())
