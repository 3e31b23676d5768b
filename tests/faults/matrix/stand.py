"""One sidecar, an agent beside it, and the books that must be right in the end."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pdp.api.v1 import budget_pb2, common_pb2
from pdp.audit.verify import verify
from pdp.client import Guard, PermitDenied
from pdp.client.decision import Decision
from pdp.closing import Closing
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.e2e.operating import records

ROOT: Final = Path(__file__).resolve().parents[3]
OPA: Final = ROOT / ".tools" / "opa"
TENANT: Final = "tenant_acme"
DAY: Final = 86_400
PATIENCE_SECONDS: Final = 30.0
"""How long anything may take to fail or to recover; far longer than it does."""


def policy_bundle(folder: Path) -> Path:
    """The policy of the matrix, built."""
    return build_bundle(Path(__file__).with_name("policy"), folder / "bundle.tar.gz", opa=OPA)


def old_issuer() -> TokenIssuer:
    """Its tokens are older than any jump of the clock here."""
    return TokenIssuer(clock=lambda: time.time() - 2 * DAY)


def wait_for(holds: Callable[[], bool], what: str, seen: Sequence[str] = ()) -> None:
    """Wait until it holds. ``seen`` is what was seen in its place."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}, but {sorted(set(seen))}"
        time.sleep(0.02)


class Stand(Closing):
    """A sidecar that was started, and an agent whose one tool says how often it ran."""

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        issuer: TokenIssuer | None = None,
        token_seconds: int = 30 * DAY,
        timeout_seconds: float = 1.5,
    ) -> None:
        """``config`` is laid over that of the matrix. ``timeout_seconds`` is how long the
        agent waits for an answer.
        """
        self.folder = folder
        self.issuer = issuer or old_issuer()
        self.sidecar = SidecarProcess(
            folder,
            issuer=self.issuer,
            bundle=policy_bundle(folder),
            config={
                "listen": {"metrics": "127.0.0.1:0"},
                "limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}},
                "budget": {"hold_ttl_seconds": 3_600},
                **(config or {}),
            },
            environment=environment,
        )
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.sidecar.close)
            self.sidecar.start()
            on_failure.pop_all()
        self.timeout_seconds = timeout_seconds
        self._token = self.issuer.token(TENANT, "agent-7", lifetime_seconds=token_seconds)
        self._guard = Guard(
            self.sidecar.target, timeout_seconds=timeout_seconds, observe=self._observe
        )
        self._caller = Caller(self.sidecar.target, token=self._token)
        self._numbers = itertools.count()
        self._granted: list[Decision] = []
        self._in_doubt = 0
        self._holds: set[str] = set()
        self.ran: list[int] = []
        """The calls in which the tool ran."""
        self.charged = 0
        """Charges that were answered."""

        @self._guard.tool("orders.update")
        def update(number: int) -> None:
            self.ran.append(number)

        self._update = update

    def call(self) -> str:
        """One guarded call: the code that it ended with. Whatever it is, it comes in time,
        and the tool has run only where it is ok.
        """
        number, began = next(self._numbers), time.monotonic()
        try:
            with self._guard.acting_for(self._token):
                self._update(number)
        except PermitDenied as refusal:
            self._in_doubt += 1
            assert number not in self.ran, "the tool ran without a permit"
            took = time.monotonic() - began
            assert took < self.timeout_seconds + 2, f"a refusal took {took:.1f} s"
            return refusal.reason_code
        assert self.ran[-1] == number
        return "ok"

    def charge(self) -> str:
        """One charge, which is held, settled and on record when it is answered: its code."""

        def ask() -> None:
            self._caller.budget.ChargeBudget(
                budget_pb2.ChargeBudgetRequest(
                    idempotency_key=str(uuid.uuid4()), charges=[_charge()]
                )
            )
            self.charged += 1

        before = self.charged
        try:
            refusal = refusal_of(ask)
        except AssertionError:
            if self.charged == before:
                raise
            return "ok"
        self._in_doubt += 1
        return refusal.reason_code

    def hold(self) -> str:
        """Hold what one call costs; the hold's id."""
        hold_id: str = self._caller.budget.ReserveBudget(
            budget_pb2.ReserveBudgetRequest(
                idempotency_key=str(uuid.uuid4()), charges=[_charge()], ttl_seconds=3_600
            )
        ).hold_id
        self._holds.add(hold_id)
        return hold_id

    def settle(self, hold_id: str) -> None:
        """Charge what was held."""
        self._caller.budget.SettleBudget(
            budget_pb2.SettleBudgetRequest(
                idempotency_key=str(uuid.uuid4()), hold_id=hold_id, charges=[_charge()]
            )
        )
        self._holds.remove(hold_id)
        self.charged += 1

    def ready(self) -> bool:
        """What /readyz says; what does not answer is not ready."""
        try:
            return self._get("/readyz")[0] == http.HTTPStatus.OK
        except OSError:
            return False

    def metric(self, name: str) -> str:
        """The value of a metric without labels."""
        [value] = re.findall(rf"^{name} (\S+)$", self._get("/metrics")[1], re.MULTILINE)
        return str(value)

    def _get(self, path: str) -> tuple[int, str]:
        said = re.findall(r"serving on .*, http://([0-9.:]+) ", self.sidecar.log.read_text())
        connection = http.client.HTTPConnection(said[-1], timeout=1)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def check_books(self) -> None:
        """What was answered is on record and counted, once; nothing is anybody else's."""
        report = verify(self.sidecar.state / "audit")
        assert report.fault is None, report.fault
        written = {each["seq"]: each for each in records(self.sidecar)}
        assert {each["tenant_id"] for each in written.values()} <= {TENANT, None}
        for decision in self._granted:
            record = written[decision.audit_sequence]
            assert record["hash"] == decision.audit_hash
            assert (record["outcome"], record["tenant_id"]) == ("allowed", TENANT)
        [limit] = self._caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
        done = len(self.ran) + self.charged
        # A call whose answer was lost may have left a hold, which expires, or a charge.
        most = done + len(self._holds) + self._in_doubt
        assert done <= limit.spent + limit.held <= most, (limit.spent, limit.held, done, most)
        assert len(self._granted) >= len(self.ran)

    def close(self) -> None:
        """Stop all of it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.sidecar.close)
            stack.callback(self._caller.close)
            stack.callback(self._guard.close)

    def _observe(self, decision: Decision) -> None:
        if decision.allowed:
            self._granted.append(decision)


def _charge() -> common_pb2.Charge:
    return common_pb2.Charge(budget="tools", unit="calls", amount=1)
