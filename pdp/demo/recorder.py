"""Watches calls from the outside: which steps each went through, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pdp.canonical import JsonObject
from pdp.client import Decision, Guard, Permit
from pdp.demo.agent import Agent
from pdp.demo.mail import MailServer
from pdp.demo.orders import OrdersServer
from pdp.demo.planner import ToolCall
from pdp.errors import PdpError
from pdp.reason import ReasonCode


class Step(StrEnum):
    """The five steps."""

    IDENTIFY = "identify"
    ISOLATE = "isolate"
    AUTHORIZE = "authorize"
    EXECUTE = "execute"
    AUDIT = "audit"


ALLOWED: Final = "allowed"
DENIED: Final = "denied"
EXECUTED: Final = "executed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTaken:
    """One step of one call."""

    step: Step
    outcome: str
    reason_code: str
    seconds: float | None
    """None where nobody took the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, from the question to its end."""

    scene: str
    action: str
    tenant_id: str | None
    """As the sidecar says; None where it verified no identity."""
    actor_id: str | None
    outcome: str
    """EXECUTED or DENIED."""
    reason_code: str
    steps: tuple[StepTaken, ...]
    """Those that were reached."""
    decision: Decision | None
    """None where the sidecar made none."""
    result: JsonObject | None
    """What the tool returned; None if it did not run."""

    @property
    def stopped_at(self) -> Step | None:
        """The step that refused it."""
        return next((each.step for each in self.steps if each.outcome == DENIED), None)


class Recorder:
    """Keeps every call, and passes each on as it ends."""

    def __init__(
        self, listener: Callable[[Call], None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``clock`` counts seconds, from any beginning."""
        self.scene = ""
        self.calls: list[Call] = []
        self._listener = listener
        self._clock = clock
        self._decisions: dict[str, Decision] = {}
        self._decision: Decision | None = None
        self._phase_began = 0.0

    def observe(self, decision: Decision) -> None:
        """For ``Guard(observe=...)``: the sidecar's answer to the call under way."""
        self._decision = decision
        self._decisions.setdefault(decision.decision_id, decision)
        self._phase_began = self._clock()

    def watch(
        self, action: str, run: Callable[[], JsonObject], *, permit: Permit | None = None
    ) -> JsonObject:
        """Run a call and record it. With ``permit``, nothing is asked any more: the
        call begins at the tool, which is shown that permit. Raises what it raises.
        """
        self._decision = self._decisions[permit.decision_id] if permit else None
        self._phase_began = self._clock()
        try:
            result = run()
        except PdpError as error:
            self._record(action, error.reason_code, None, at_tool=permit is not None)
            raise
        self._record(action, ReasonCode.OK, result, at_tool=permit is not None)
        return result

    def _record(
        self, action: str, reason_code: str, result: JsonObject | None, *, at_tool: bool
    ) -> None:
        decision = self._decision
        outcome = DENIED if result is None else EXECUTED
        spent = self._clock() - self._phase_began
        call = Call(
            scene=self.scene,
            action=action,
            tenant_id=decision.tenant if decision else None,
            actor_id=decision.actor if decision else None,
            outcome=outcome,
            reason_code=reason_code,
            steps=tuple(_steps(decision, outcome, reason_code, spent, at_tool=at_tool)),
            decision=decision,
            result=result,
        )
        self.calls.append(call)
        self._listener(call)


class WatchedAgent(Agent):
    """The agent, with every call watched."""

    def __init__(
        self, guard: Guard, *, orders: OrdersServer, mail: MailServer, recorder: Recorder
    ) -> None:
        super().__init__(guard, orders=orders, mail=mail)
        self._recorder = recorder

    def call(self, call: ToolCall) -> JsonObject:
        """As :meth:`Agent.call`."""
        return self._recorder.watch(call.tool, lambda: super(WatchedAgent, self).call(call))


def _steps(
    decision: Decision | None, outcome: str, reason_code: str, spent: float, *, at_tool: bool
) -> Iterator[StepTaken]:
    """The steps that a call reached. ``spent`` is what it took after the decision:
    to verify and redeem the permit, run the tool and report.
    """
    if decision is None:
        yield _taken(Step.IDENTIFY, DENIED, reason_code, None)
        return
    if at_tool:
        yield _taken(Step.EXECUTE, outcome, reason_code, spent)
        return
    seconds = decision.step_seconds
    for step in (Step.IDENTIFY, Step.ISOLATE):
        yield _taken(step, ALLOWED, ReasonCode.OK, seconds.get(step))
    ruling = ALLOWED if decision.allowed else DENIED
    yield _taken(Step.AUTHORIZE, ruling, decision.reason_code, seconds.get(Step.AUTHORIZE))
    if decision.allowed:
        signed = seconds.get(Step.EXECUTE, 0.0)
        yield _taken(Step.EXECUTE, outcome, reason_code, signed + spent)
    yield _taken(Step.AUDIT, outcome, reason_code, seconds.get(Step.AUDIT))


def _taken(step: Step, outcome: str, reason_code: str, seconds: float | None) -> StepTaken:
    return StepTaken(step=step, outcome=outcome, reason_code=reason_code, seconds=seconds)
