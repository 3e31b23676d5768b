"""What the store and the processes of a run have used so far."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.budget.redis_server import RedisServer

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Counts of the store since it began. Between two of them lie the first reader's own
    connection and answer, which :meth:`since` leaves out.
    """

    scripts: int
    """Operations on budgets: one round trip each."""
    looks: int
    """At whether something was revoked: one round trip each."""
    new_connections: int
    connections: int
    """Open now."""
    received_bytes: int
    sent_bytes: int
    cpu_seconds: float
    answer_bytes: int
    """Of the reader's own."""

    @property
    def round_trips(self) -> int:
        return self.scripts + self.looks

    @property
    def moved_bytes(self) -> int:
        """There and back."""
        return self.received_bytes + self.sent_bytes

    def since(self, before: Store) -> Store:
        """What came between; connections as they are now."""
        return Store(
            scripts=self.scripts - before.scripts,
            looks=self.looks - before.looks + 1,
            new_connections=self.new_connections - before.new_connections - 1,
            connections=self.connections,
            received_bytes=self.received_bytes - before.received_bytes,
            sent_bytes=self.sent_bytes - before.sent_bytes - before.answer_bytes,
            cpu_seconds=self.cpu_seconds - before.cpu_seconds,
            answer_bytes=0,
        )


def read_store(server: RedisServer) -> Store:
    answer = server.command("INFO", "everything")
    info = dict(line.split(":", 1) for line in answer.decode().splitlines() if ":" in line)

    def calls(command: str) -> int:
        text = info.get(f"cmdstat_{command}", "calls=0")
        return int(text.split(",")[0].removeprefix("calls="))

    scripts = calls("evalsha") + calls("eval")
    connected = int(info["total_connections_received"])
    # Scripts read the clock of a tenant, all but those about permits, which alone ask for
    # HEXISTS; and each new connection asks whether the store is still the same.
    other_reads = scripts - calls("hexists") + connected
    return Store(
        scripts=scripts,
        looks=calls("get") - other_reads,
        new_connections=connected,
        connections=int(info["connected_clients"]) - 1,
        received_bytes=int(info["total_net_input_bytes"]),
        sent_bytes=int(info["total_net_output_bytes"]),
        cpu_seconds=float(info["used_cpu_user"]) + float(info["used_cpu_sys"]),
        answer_bytes=len(answer),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a process has used, and what it holds."""

    cpu_seconds: float
    rss_bytes: int
    pss_bytes: int
    """Memory shared by several processes is counted to each in part."""


def read_process(pid: int) -> Process:
    # The command's name, in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    sizes = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kib = {name: int(text.split()[0]) for name, text in (line.split(":", 1) for line in sizes)}
    return Process(
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
        rss_bytes=kib["Rss"] * 1024,
        pss_bytes=kib["Pss"] * 1024,
    )


@dataclass(frozen=True, slots=True)
class Audited:
    """Records of one kind."""

    number: int
    size_bytes: int


def read_audit(state: Path) -> dict[str, Audited]:
    """By action and outcome, what a sidecar has put on record."""
    numbers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for file in (state / "audit").rglob("*.jsonl"):
        for line in file.read_bytes().splitlines(keepends=True):
            record = json.loads(line)
            kind = f"{record['action']} {record['outcome']}"
            numbers[kind] += 1
            sizes[kind] += len(line)
    return {kind: Audited(numbers[kind], sizes[kind]) for kind in numbers}
