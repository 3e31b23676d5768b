"""Kill a sidecar at random moments, and check what it knows: ``python -m tests.faults.kills``.

In a round, agents use the sidecar while something else is under way besides: a reload, a
rotation of keys, a revocation, a new segment of the audit log. Then it is killed, started
again unaided, and held against what every agent knows.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pdp.audit.verify import verify
from pdp.permit.ring import KeyRing
from pdp.policy.archive import pack, read_directory
from pdp.policy.compile import build_files
from pdp.policy.last_good import LastGood
from pdp.server.policy import POLICY_DIRECTORY
from pdp.storage import Durability
from pdp.testing import SidecarProcess, TokenIssuer
from tests.budget.redis_server import RedisServer
from tests.faults.agents import (
    SESSION_LIMIT,
    Agent,
    BrokenPromiseError,
    at_work,
    check_records,
    check_sums,
)
from tests.faults.disk import Disk

ROOT: Final = Path(__file__).resolve().parents[2]
TENANTS: Final = ("tenant_acme", "tenant_globex", "tenant_initech")
STORES: Final = ("sqlite", "leased")
LEASE_SECONDS: Final = 2
SYNCED_AFTER_SECONDS: Final = 3.0
"""The audit log promises about one, and this machine may be busy."""
Ended = Callable[[], None]
"""Done once the sidecar runs again: takes in what became of the disturbance."""
_LIMITS: Final = {
    "call_timeout_seconds": 30.0,
    "tenants": {"calls_per_second": 100_000, "burst": 100_000},
}
"""How fast agents may be is not the matter here."""


class KillLoop:
    """One sidecar, its agents, and whoever operates it."""

    def __init__(
        self,
        folder: Path,
        store: str,
        seed: int,
        *,
        redis: RedisServer | None = None,
        disk: Disk | None = None,
        durability: Durability = Durability.PROCESS,
    ) -> None:
        """``disk`` loses power whenever the sidecar is killed."""
        self._durability = durability
        self._disk = disk
        self._environment = disk.environment if disk is not None else {}
        self._dice = random.Random(f"{seed}-{store}")  # noqa: S311 - when to kill is no secret
        self._issuer = TokenIssuer()
        self._releases = [_release(str(number)) for number in range(2)]
        self._bundle = folder / "bundle.tar.gz"
        self._publish(0)
        self.sidecar = SidecarProcess(
            folder,
            issuer=self._issuer,
            bundle=self._bundle,
            config=self._config(redis),
            environment=self._environment,
        )
        self.agents = self._new_agents()
        self._leased = store == "leased"
        self._asked: Counter[str] = Counter()
        """Tokens by tenant, of agents that were there before."""
        self._signing = ""
        """The key that signs, where a rotation is known to have ended."""
        self._revoked: list[str] = []
        self._commands: list[subprocess.Popen[str]] = []
        self.disturbed: Counter[str] = Counter()
        self.changes_lost = 0

    def _config(self, redis: RedisServer | None) -> dict[str, Any]:
        durability = self._durability.value
        budget: dict[str, Any] = {"hold_ttl_seconds": 3_600, "durability": durability}
        if redis is not None:
            budget["store"] = {"unix": str(redis.socket), "timeout_ms": 5_000}
            budget["lease"] = {"seconds": LEASE_SECONDS}
        return {
            "limits": _LIMITS,
            "permit": {"ttl_seconds": 3_600},
            "policy": {
                "bundles": {"all": {"path": str(self._bundle), "poll_seconds": 0.1}},
                "evaluation_timeout_ms": 10_000,  # this machine may be busy
            },
            "budget": budget,
            # Records as large as they get, so that segments are full soon.
            "audit": {
                "segment_max_bytes": 1_048_576,
                "record_policy_input": True,
                "durability": durability,
            },
        }

    def _new_agents(self) -> list[Agent]:
        return [
            Agent(f"agent-{number}", TENANTS[number % len(TENANTS)], self._issuer, self._dice)
            for number in range(6)
        ]

    def round(self, disturbance: str) -> None:
        """Use, disturb, kill, start and check. Raises BrokenPromiseError."""
        session = str(uuid.UUID(int=self._dice.getrandbits(128)))
        for agent in self.agents:
            agent.meet(self.sidecar.target, session)
        with at_work(self.agents):
            enough = self._answered() + self._dice.randrange(30, 90)
            wait_until(lambda: self._answered() >= enough, "the agents get no answers")
            ended = getattr(self, f"_{disturbance}")()
            self.sidecar.kill()
        self.disturbed[disturbance] += 1
        if self._disk is not None:
            self._stop_commands()
            self.changes_lost += self._disk.lose_power(self._dice)
        killed_at = time.monotonic()
        self.sidecar.start()
        if ended is not None:
            ended()
        if self._disk is not None and self._durability is Durability.PROCESS:
            self._check_what_is_left(killed_at)
        else:
            self._check()
        for agent in self.agents:
            agent.leave()

    def _answered(self) -> int:
        return sum(len(agent.knows.answered) for agent in self.agents)

    # What is under way when the sidecar is killed. Each leaves to the dice how far it gets,
    # and may give what is to be done once the sidecar runs again.

    def _nothing(self) -> None:
        self._pause(0.05)

    def _reload(self) -> None:
        self._publish(sum(self.disturbed.values()) % 2)
        self._pause(0.5)

    def _rotate_keys(self) -> Ended:
        def ended(told: str) -> None:
            self._signing = told.split(maxsplit=1)[0]

        self._signing = ""
        return self._operate(ended, "keys", "rotate", "--overlap-seconds", "0")

    def _revoke(self) -> Ended:
        name = f"revoked-{sum(self.disturbed.values())}"

        def ended(_: str) -> None:
            self._revoked.append(name)

        return self._operate(ended, "revoke", "actor", "tenant_acme", name, "--reason", "fired")

    def _wait_for_a_sync(self) -> None:
        time.sleep(SYNCED_AFTER_SECONDS + 1)

    def _begin_segment(self) -> None:
        before = self._segments()
        wait_until(lambda: self._segments() > before, "no segment begins")
        self._pause(0.005)

    def _renew_leases(self) -> None:
        self._pause(LEASE_SECONDS)

    def _publish(self, release: int) -> None:
        draft = self._bundle.with_suffix(".draft")
        draft.write_bytes(self._releases[release])
        draft.replace(self._bundle)

    def _operate(self, ended: Callable[[str], None], *words: str) -> Ended:
        """Begin a command, of which it may be seen that it has done what it should."""
        command = subprocess.Popen(
            [sys.executable, "-m", "pdp", *words, "--config", str(self.sidecar.config_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self._environment},
        )
        self._commands.append(command)
        if self._dice.random() < 0.5:
            wait_until(lambda: command.poll() is not None, "the command does not end")
        self._pause(0.8)

        def see() -> None:
            told, _ = command.communicate(timeout=60)
            if command.returncode == 0:
                ended(told)
            elif command.returncode != -signal.SIGKILL:
                raise BrokenPromiseError(f"{words} ended with {command.returncode}: {told}")

        return see

    def _stop_commands(self) -> None:
        for command in self._commands:
            if command.poll() is None:
                command.kill()
                command.wait(20)
        self._commands.clear()

    def _pause(self, most_seconds: float) -> None:
        time.sleep(self._dice.uniform(0, most_seconds))

    def _segments(self) -> int:
        return len(list((self.sidecar.state / "audit").glob("audit-*.jsonl")))

    def _check(self) -> None:
        """Hold the sidecar against what everybody knows. Raises BrokenPromiseError."""
        for agent in self.agents:
            agent.settle_doubts()
            agent.check_answers(15)
            agent.check_permits()
            agent.check_delegations()
        check_sums(self.agents, leased=self._leased)
        self._check_revoked()
        self._check_files()

    def _check_what_is_left(self, killed_at: float) -> None:
        """Where power was lost that durability does not cover: nobody knows more than the
        sidecar, which is whole, and has the records that were not of the last moments. All
        agents are new ones afterwards. Raises BrokenPromiseError.
        """
        for tenant in TENANTS:
            agents = [agent for agent in self.agents if agent.tenant == tenant]
            self._asked[tenant] += sum(agent.most_tokens for agent in agents)
            at_most = self._asked[tenant]
            found = agents[0].standing()
            if sum(found["tokens"]) > at_most or sum(found["session"]) > SESSION_LIMIT:
                raise BrokenPromiseError(f"{tenant}: {at_most} was asked for, {found} is known")
        self._check_files(killed_at - SYNCED_AFTER_SECONDS)
        for agent in self.agents:
            agent.leave()
        self.agents = self._new_agents()

    def _check_revoked(self) -> None:
        for name in self._revoked[-2:]:
            agent = Agent(name, "tenant_acme", self._issuer, self._dice)
            agent.meet(self.sidecar.target, "")
            agent.check_revoked()
            agent.leave()

    def _check_files(self, before: float = math.inf) -> None:
        """``before``: what was acknowledged until then is on record."""
        state = self.sidecar.state
        signing = KeyRing.from_file(state / "permit-key.pem").signing.kid
        if self._signing not in {"", signing}:
            raise BrokenPromiseError(f"{self._signing} was to sign, and {signing} does")
        if LastGood(state / POLICY_DIRECTORY).read("all") is None:
            raise BrokenPromiseError("the bundle that was good last is lost")
        check_records(self.agents, self.sidecar, before)


DISTURBANCES: Final[Mapping[str, tuple[str, ...]]] = {
    "sqlite": ("nothing", "reload", "rotate_keys", "revoke", "begin_segment"),
    "leased": ("nothing", "renew_leases", "renew_leases", "revoke"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a loop was made of."""

    disturbed: Counter[str]
    answers: int
    epochs: int
    changes_lost: int
    """That were not synced when power was lost."""


def play(
    folder: Path,
    store: str,
    *,
    seed: int,
    kills: int,
    power: bool = False,
    durability: Durability = Durability.POWER,
    disturbances: Sequence[str] = (),
) -> Outcome:
    """So many rounds with one store, of what disturbs that one or of ``disturbances``;
    ``power`` is lost with each kill. Raises BrokenPromiseError.
    """
    with contextlib.ExitStack() as stack:
        redis = None
        if store == "leased":
            short = stack.enter_context(tempfile.TemporaryDirectory(prefix="pdp-"))
            redis = RedisServer(Path(short), "appendfsync always").start()
            stack.callback(redis.stop)
        place = folder / "sidecar"
        place.mkdir()
        disk = Disk(place, folder) if power else None
        if disk is None:
            durability = Durability.PROCESS
        loop = KillLoop(place, store, seed, redis=redis, disk=disk, durability=durability)
        with loop.sidecar:
            for number in range(kills):
                kinds = disturbances or DISTURBANCES[store]
                loop.round(kinds[number % len(kinds)])
            loop.sidecar.terminate()
        report = verify(loop.sidecar.state / "audit")
        answers = sum(len(agent.knows.answered) for agent in loop.agents)
        return Outcome(loop.disturbed, answers, report.epochs, loop.changes_lost)


def _release(revision: str) -> bytes:
    sources = read_directory(ROOT / "tests/faults/policy")
    opa = ROOT / ".tools/opa"
    return pack(build_files(sources, opa=opa, revision=revision, sequence=None))


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.001)


def main() -> int:
    """Kill a hundred times, or as often as is said, with each store in turn."""
    parser = argparse.ArgumentParser(description="Kill sidecars, and check what they know.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--power", action="store_true", help="lose power with each kill")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    share = arguments.kills // len(STORES)
    for store in STORES:
        folder = Path(tempfile.mkdtemp(prefix=f"pdp-kills-{store}-{arguments.seed}-"))
        kills = share if store != STORES[0] else arguments.kills - share * (len(STORES) - 1)
        sys.stdout.write(f"{store}, seed {arguments.seed}, in {folder}\n")
        sys.stdout.flush()
        outcome = play(folder, store, seed=arguments.seed, kills=kills, power=arguments.power)
        sys.stdout.write(f"{outcome}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
