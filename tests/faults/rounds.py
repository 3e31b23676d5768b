"""Rounds of faults, and whether what came of them can be: ``python -m tests.faults.rounds``.

In a round, processes of callers work on one store while they, the store and the ways
between them are killed, stopped and broken. Then all is made whole, every call gets its
answer, and the history is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pdp.budget.redis_ledger import RedisLedger
from pdp.config import RedisSettings
from pdp.redis_store import open_redis
from tests.budget.redis_server import RedisServer
from tests.faults.callers import Plan, open_ledger
from tests.faults.checker import check, excerpt
from tests.faults.history import COUNT, Answer, Call, Event, Kind, read_events, readings
from tests.faults.toxiproxy import Toxiproxy, free_port
from tests.faults.world import World

ROOT: Final = Path(__file__).resolve().parents[2]
STORES: Final = ("sqlite", "redis", "leased")
PROCESSES: Final = {"sqlite": 1, "redis": 3, "leased": 3}
END_SECONDS: Final = 90
"""In which a process has to finish once all is whole again."""
ROUND_SECONDS: Final = 20

Fault = Callable[[], None]


class FaultsFoundError(AssertionError):
    """A promise was broken. The message says where the history is, and shows the fault."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round was made of."""

    events: Counter[str]
    faults: Counter[str]

    def __str__(self) -> str:
        events = ", ".join(f"{count} {name}" for name, count in sorted(self.events.items()))
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        return f"{events}; {faults}"


def play(store: str, folder: Path, *, seed: int, seconds: float) -> Outcome:
    """One round. Raises FaultsFoundError."""
    with contextlib.ExitStack() as stack:
        stage = stack.enter_context(_stage(store, folder, seed))
        faults = stage.disturb(seconds)
        stage.finish()
        events = stage.count()
    with (folder / "history.jsonl").open("w", encoding="utf-8") as history:
        history.writelines(event.line() + "\n" for event in events)
    leased = store == "leased"
    found = check(events, World(leased=leased).limits, leased=leased)
    if found:
        kinds = Counter(fault.kind for fault in found)
        shown = min(found, key=lambda fault: len(fault.attempts))
        raise FaultsFoundError(
            f"{store}, seed {seed}: {dict(kinds)}. The history is {folder / 'history.jsonl'}\n"
            + excerpt(events, shown)
        )
    return Outcome(Counter(_kind(event) for event in events), faults)


def _kind(event: Event) -> str:
    if event.answer is None:
        return str(event.kind)
    return "refused" if event.answer.refused_by else "ok"


class _Process:
    """A process of callers, and those that come after it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._log = plan.history.with_name(f"{plan.process}.log")
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.callers", self.plan.text()],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stderr=log,
            )

    def kill_and_start(self) -> None:
        self.kill()
        self.plan = replace(self.plan, run=self.plan.run + 1)
        self.start()

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def finish(self) -> None:
        """Let it end by itself."""
        assert self._child.stdin is not None
        self._child.stdin.close()

    def wait(self) -> None:
        assert self._child.wait(END_SECONDS) == 0, self._log.read_text(encoding="utf-8")

    def kill(self) -> None:
        self._child.kill()
        self._child.wait(20)
        if self._child.stdin is not None:
            self._child.stdin.close()


class _Stage:
    """The store, the ways to it and the processes of one round."""

    def __init__(
        self,
        plans: list[Plan],
        dice: random.Random,
        redis: RedisServer | None,
        proxy: Toxiproxy | None,
    ) -> None:
        self._processes = [_Process(plan) for plan in plans]
        self._dice = dice
        self._redis = redis
        self._proxy = proxy

    def disturb(self, seconds: float) -> Counter[str]:
        """One fault after the other; how many of each there were."""
        done: Counter[str] = Counter()
        until = time.monotonic() + seconds
        time.sleep(min(1.0, seconds / 4))
        while time.monotonic() < until:
            fault = self._dice.choice(self._faults())
            done[fault.__name__.strip("_")] += 1
            fault()
            time.sleep(self._dice.uniform(0.1, 0.8))
        return done

    def _faults(self) -> list[Fault]:
        faults: list[Fault] = [self._kill_callers, self._stop_callers]
        if self._redis is not None:
            faults += [self._kill_redis, self._stop_redis]
        if self._proxy is not None:
            faults += [self._poison, self._poison, self._poison, self._cut]
        return faults

    def _kill_callers(self) -> None:
        self._dice.choice(self._processes).kill_and_start()
        time.sleep(self._dice.uniform(0.5, 1.5))  # or it would never get to its calls

    def _stop_callers(self) -> None:
        process = self._dice.choice(self._processes)
        process.signal(signal.SIGSTOP)
        time.sleep(self._dice.choice((0.3, 1.0, 3.0)))
        process.signal(signal.SIGCONT)

    def _kill_redis(self) -> None:
        assert self._redis is not None
        self._redis.kill()
        time.sleep(self._dice.uniform(0, 0.5))
        self._redis.start()

    def _stop_redis(self) -> None:
        assert self._redis is not None
        self._redis.signal(signal.SIGSTOP)
        time.sleep(self._dice.uniform(0.1, 1.5))
        self._redis.signal(signal.SIGCONT)

    def _cut(self) -> None:
        assert self._proxy is not None
        self._proxy.cut(self._dice.choice(self._processes).plan.process)
        time.sleep(self._dice.uniform(0.2, 2.5))
        self._proxy.heal()

    def _poison(self) -> None:
        assert self._proxy is not None
        toxic, attributes = self._dice.choice(
            (
                ("latency", {"latency": 60, "jitter": 50}),
                ("timeout", {"timeout": 0}),  # half open: what is sent is lost
                ("timeout", {"timeout": 200}),
                ("reset_peer", {"timeout": 50}),
                ("slow_close", {"delay": 500}),
                ("bandwidth", {"rate": 4}),
                ("slicer", {"average_size": 20, "size_variation": 10, "delay": 500}),
                ("limit_data", {"bytes": 5000}),
            )
        )
        name = self._dice.choice(self._processes).plan.process
        stream = self._dice.choice(("upstream", "downstream"))
        self._proxy.poison(name, toxic, stream, **attributes)
        time.sleep(self._dice.uniform(0.2, 1.5))
        self._proxy.heal()

    def finish(self) -> None:
        """All goes on by itself until every call has its answer."""
        for process in self._processes:
            process.finish()
        for process in self._processes:
            process.wait()

    def count(self) -> list[Event]:
        """The history, and what every account that it names holds when all is over."""
        plans = [process.plan for process in self._processes]
        events = read_events([plan.history for plan in plans])
        return events + asyncio.run(_count(plans[0], events, self._redis))

    def stop(self) -> None:
        for process in self._processes:
            process.kill()


@contextlib.contextmanager
def _stage(store: str, folder: Path, seed: int) -> Iterator[_Stage]:
    with contextlib.ExitStack() as stack:
        redis = proxy = None
        address = ""
        if store != "sqlite":
            port = free_port()
            address = f"127.0.0.1:{port}"
            redis = RedisServer(
                folder / "r", f"port {port}", "bind 127.0.0.1", "appendfsync always"
            )
            stack.callback(redis.stop)
            redis.start()
            proxy = Toxiproxy(folder)
            stack.callback(proxy.stop)
        plans = []
        for number in range(PROCESSES[store]):
            name = f"p{number}"
            way = proxy.add(name, address) if proxy is not None else ""
            plans.append(
                Plan(process=name, run=0, seed=seed, store=store, address=way, folder=str(folder))
            )
        stage = _Stage(plans, random.Random(seed), redis, proxy)  # noqa: S311 - to be done again alike
        stack.callback(stage.stop)
        yield stage


async def _count(plan: Plan, events: list[Event], redis: RedisServer | None) -> list[Event]:
    """The sums of the ledger that all share."""
    limits = World(leased=plan.store == "leased").limits
    if redis is None:
        ledger = await open_ledger("sqlite", "", Path(plan.folder) / "shared", plan.process)
    else:
        ledger = RedisLedger(await open_redis(RedisSettings(unix=redis.socket)))
    accounts = {event.call.account: None for event in events if event.call is not None}
    told = []
    for number, account in enumerate(accounts):
        call = Call(operation=COUNT, account=account, limits=tuple(limits))
        begun = _event(Kind.INVOKE, number, call=call)
        states = await ledger.state(account, limits=list(limits.values()))
        answer = Answer(limits=readings(states))
        told += [begun, _event(Kind.OK, number, answer=answer)]
    await ledger.close()
    return told


def _event(
    kind: Kind, number: int, *, call: Call | None = None, answer: Answer | None = None
) -> Event:
    return Event(
        kind=kind,
        attempt=f"count/{number}",
        at=time.monotonic(),
        clock=time.time(),
        call=call,
        answer=answer,
    )


def main() -> int:
    """Round after round until the time is over; the first fault ends it."""
    parser = argparse.ArgumentParser(description="Break ledgers, and check what came of it.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--store", choices=(*STORES, "all"), default="all")
    arguments = parser.parse_args()
    stores = STORES if arguments.store == "all" else (arguments.store,)
    until = time.monotonic() + arguments.seconds
    seed = arguments.seed
    while time.monotonic() < until:
        store = stores[(seed - arguments.seed) % len(stores)]
        seconds = min(ROUND_SECONDS, max(2.0, until - time.monotonic()))
        folder = Path(tempfile.mkdtemp(prefix=f"pdp-history-{store}-{seed}-"))
        try:
            outcome = play(store, folder, seed=seed, seconds=seconds)
        except AssertionError as error:
            sys.stderr.write(f"{error}\nagain: --store {store} --seed {seed}\n")
            return 1
        sys.stdout.write(f"{store}, seed {seed}: {outcome}\n")
        sys.stdout.flush()
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
