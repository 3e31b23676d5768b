"""Whatever happens in whatever order: no permit is overspent, spent after its end, or
reported on but once.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle as Uses
from hypothesis.stateful import RuleBasedStateMachine, consumes, initialize, invariant, rule

from pdp.api.v1 import execution_pb2
from pdp.client.acting import Acting
from pdp.client.desk import Ask, Grant, Steps, Walk
from pdp.client.pool import InForce, Kept, Moment, PermitPool
from pdp.permit.claims import Permit

LIFETIME_SECONDS = 10
KEYS = tuple((token, b"", "orders.search", "tools") for token in ("alice", "bob"))
REVISIONS = st.sampled_from(("r-1", "r-2"))


class Spending(RuleBasedStateMachine):
    under_way = Uses("under_way")
    asked = Uses("asked")

    @initialize()
    def begin(self) -> None:
        self.now = 1_000.0
        self.pool = PermitPool(
            keeps=True, on_change=lambda: None, clock=lambda: self.now, monotonic=lambda: self.now
        )
        self.made: dict[str, int] = {}
        self.permits: dict[str, Permit] = {}
        self.ended: dict[str, int] = {}
        self.reports: dict[str, int] = {}
        self.heard_at: dict[str, int] = {}
        """What had been heard when the permit was asked for."""
        self.heard = 0
        self.permitted = 0

    @rule(target=asked)
    def ask(self) -> tuple[Moment, int]:
        return self.pool.moment(), self.heard

    @rule(
        target=under_way,
        asked=consumes(asked),
        key=st.sampled_from(KEYS),
        max_uses=st.integers(2, 4),
        revision=REVISIONS,
    )
    def is_permitted(
        self,
        asked: tuple[Moment, int],
        key: tuple[str, bytes, str, str],
        max_uses: int,
        revision: str,
    ) -> Kept:
        moment, heard = asked
        permit = Permit(
            id=f"p-{self.permitted}",
            issuer="agent-pdp",
            audience="tools",
            tenant=f"tenant-of-{key[0]}",
            actor=key[0],
            tool="orders.search",
            arguments_sha256="",
            scopes=(),
            transaction="t-1",
            decision_id="d-1",
            policy_revision=revision,
            ledger="l-1",
            issued_at=int(moment.at),
            expires_at=int(moment.at) + LIFETIME_SECONDS,
            max_uses=max_uses,
            token=f"p-{self.permitted}",
        )
        self.permitted += 1
        self.permits[permit.id] = permit
        self.heard_at[permit.id] = heard
        self.made[permit.id] = 1
        self.ended[permit.id] = 0
        return self.pool.put(Grant(permit, (), Acting(key[0], b"", "")), key, asked=moment)

    @rule(target=under_way, key=st.sampled_from(KEYS))
    def call(self, key: tuple[str, bytes, str, str]) -> Kept | None:
        kept = self.pool.take(key)
        if kept is not None:
            permit = kept.permit
            self.made[permit.id] += 1
            assert permit.actor == key[0]
            assert self.now < permit.expires_at
            assert self.heard_at[permit.id] == self.heard
            assert self.pool.in_force is not None
            assert self.pool.in_force.revision == permit.policy_revision
            assert permit.id not in self.reports
        return kept

    @rule(use=consumes(under_way), fails=st.booleans())
    def end(self, use: Kept | None, fails: bool) -> None:  # noqa: FBT001
        if use is None:
            return
        is_ours = use.permit.id in self.permits
        if is_ours:
            self.ended[use.permit.id] += 1
        report = use.failed(KeyError(), tuple) if fails else use.executed(tuple)
        if report is not None:
            assert is_ours
            self._report(report)

    @rule(revision=REVISIONS)
    def watch_tells(self, revision: str) -> None:
        self.heard += 1
        self.pool.told(InForce(revision))

    @rule()
    def watch_ends(self) -> None:
        self.heard += 1
        self.pool.told(None)

    @rule(seconds=st.sampled_from((0.5, 4.0, 11.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def keeper_looks(self) -> None:
        self.pool.seconds_to_next_end()
        while (kept := self.pool.next_due()) is not None:
            self._report(kept.report())

    @rule()
    def forks(self) -> None:
        """From here on it is the child."""
        self.pool.forget()
        self.heard += 1
        self.permits.clear()
        self.reports.clear()
        self.made.clear()
        self.ended.clear()

    def _report(self, steps: Steps[None]) -> None:
        walk = Walk(steps)
        assert isinstance(walk.ask, Ask)
        request = walk.ask.request
        assert isinstance(request, execution_pb2.ReportOutcomeRequest)
        walk.answer(execution_pb2.ReportOutcomeResponse())
        permit = request.permit
        assert permit not in self.reports
        assert request.uses == self.made[permit] == self.ended[permit]
        self.reports[permit] = request.uses

    @invariant()
    def no_permit_is_overspent(self) -> None:
        for permit, made in self.made.items():
            assert made <= self.permits[permit].max_uses

    def teardown(self) -> None:
        """In the end each is reported on, if its uses have ended."""
        self.pool.told(None)
        self.keeper_looks()
        over = {each for each, made in self.made.items() if made == self.ended[each]}
        assert self.reports.keys() == over


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
