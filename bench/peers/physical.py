"""What one decision can not do without, each by itself in a tight loop: what would be left if
Python, gRPC and every hand-over between threads cost nothing.
"""

from __future__ import annotations

import hashlib
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import apsw
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.peers.question import ROLE, SCOPES, TOOL, call
from bench.peers.tenants import bundle
from pdp.canonical import JsonObject
from pdp.policy.bundle import load_bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.wasm import WasmEvaluator

ROUNDS: Final = 2_000
_BYTES: Final = 600
"""About those of a question, of an answer, and of a record."""


def physical(folder: Path, rounds: int = ROUNDS) -> Mapping[str, float]:
    """Median microseconds, by what is done."""
    key, text = Ed25519PrivateKey.generate(), os.urandom(_BYTES)
    arguments: JsonObject = {"order_id": call(1).order_id, "status": call(1).status}
    rules = WasmEvaluator(load_bundle(bundle(folder / "bundle.tar.gz")), memory_max_mib=256)
    question: JsonObject = {
        "subject": {
            "id": "alice",
            "type": "user",
            "properties": {"tenant": call(1).tenant, "roles": [ROLE], "scopes": [*SCOPES]},
        },
        "action": {"name": TOOL, "properties": {"arguments": arguments}},
        "context": {"request_id": "1", "time": 1},
    }
    assert rules.evaluate(Entrypoint.AUTHZ_DECISION, question)["allow"]  # type: ignore[index,call-overload]
    with rules, (folder / "log").open("ab", buffering=0) as log:
        return {
            "there and back over a Unix socket, between two processes": _socket(rounds),
            "digest of the arguments, RFC 8785 and SHA-256": _us(
                lambda: hashlib.sha256(rfc8785.dumps(arguments)).digest(), rounds
            ),
            "the decision's rule, Wasm as OPA compiles it": _us(
                lambda: rules.evaluate(Entrypoint.AUTHZ_DECISION, question), rounds
            ),
            "the limits' rule": _us(
                lambda: rules.evaluate(Entrypoint.BUDGET_LIMITS, question), rounds
            ),
            "signature of the permit, Ed25519": _us(lambda: key.sign(text), rounds),
            "hold, one transaction of SQLite without a sync": _sqlite(folder / "db", rounds),
            "record, one write to a file": _us(lambda: log.write(text), rounds),
        }


def _us(do: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        do()
        times.append(time.perf_counter_ns() - began)
    return round(statistics.median(times) / 1e3, 2)


def _socket(rounds: int) -> float:
    mine, others = socket.socketpair()
    child = os.fork()
    if child == 0:
        mine.close()
        while data := others.recv(_BYTES):
            others.sendall(data)
        os._exit(0)
    others.close()
    text = bytes(_BYTES)

    def exchange() -> None:
        mine.sendall(text)
        mine.recv(_BYTES, socket.MSG_WAITALL)

    try:
        return _us(exchange, rounds)
    finally:
        mine.close()
        os.waitpid(child, 0)


def _sqlite(file: Path, rounds: int) -> float:
    database = apsw.Connection(str(file))
    database.execute("PRAGMA journal_mode = wal")
    database.execute("PRAGMA synchronous = normal")
    database.execute("CREATE TABLE holds (id INTEGER PRIMARY KEY, key TEXT UNIQUE, note TEXT)")
    database.execute("CREATE TABLE spent (account TEXT PRIMARY KEY, held INTEGER)")
    database.execute("INSERT INTO spent VALUES ('day', 0), ('minute', 0)")
    keys = iter(range(rounds))

    def hold() -> None:
        with database:
            database.execute(
                "INSERT INTO holds (key, note) VALUES (?, ?)", (str(next(keys)), "x" * 300)
            )
            database.execute("UPDATE spent SET held = held + 1 WHERE account = 'day'")
            database.execute("UPDATE spent SET held = held + 1 WHERE account = 'minute'")

    try:
        return _us(hold, rounds)
    finally:
        database.close()
