"""How the demonstration is shown: to people, or as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdp.client import Decision
from pdp.demo.checks import Check
from pdp.demo.recorder import DENIED, EXECUTED, Call, Step, StepTaken
from pdp.demo.scenes import MAIN, Ending, Scene
from pdp.demo.stage import Stage
from pdp.reason import ReasonCode


class Show(Protocol):
    """Is told what happens, as it happens."""

    def opened(self, stage: Stage, request: str) -> None:
        """All is set up; the main job comes next."""
        ...

    def called(self, call: Call) -> None:
        """A call has ended."""
        ...

    def ended(self, scene: Scene, title: str, ending: Ending) -> None:
        """A scene has ended; ``title`` is its title, filled in."""
        ...

    def checked(self, checks: list[Check]) -> None:
        """The end: what was found."""
        ...


class JsonShow:
    """One JSON object a line: each step of each call, then each check."""

    def __init__(self, write_line: Callable[[str], None]) -> None:
        self._write_line = write_line

    def opened(self, stage: Stage, request: str) -> None:  # noqa: ARG002 - a line is a step
        """Nothing is shown yet."""
        self._tenant_id = stage.tenant.id

    def called(self, call: Call) -> None:
        """A line for each step."""
        for taken in call.steps:
            self._write(
                scene=call.scene,
                step=taken.step,
                tenant_id=call.tenant_id,
                actor_id=call.actor_id,
                action=call.action,
                outcome=taken.outcome,
                reason_code=taken.reason_code,
                duration_ms=None if taken.seconds is None else round(taken.seconds * 1000, 3),
                decision_id=call.decision.decision_id if call.decision else None,
            )

    def ended(self, scene: Scene, title: str, ending: Ending) -> None:
        """Nothing more: its calls are shown, and it is one of the checks."""

    def checked(self, checks: list[Check]) -> None:
        """A line for each check."""
        for check in checks:
            self._write(
                scene="checks",
                step="check",
                tenant_id=self._tenant_id,
                actor_id=None,
                action=check.name,
                outcome="passed" if check.holds else "failed",
                reason_code=ReasonCode.OK if check.holds else "check_failed",
                found=check.found,
            )

    def _write(self, **members: str | float | None) -> None:
        self._write_line(json.dumps(members))


class TextShow:
    """Tables for people."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._played: set[str] = set()

    def opened(self, stage: Stage, request: str) -> None:
        """Who asks for what, and of whom."""
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        for name, fact in (
            ("request", request),
            ("on behalf of", f"{stage.tenant.agent_user} of {stage.tenant.id}, by a signed token"),
            ("also here", f"{stage.other.id}, which has an order #{stage.plan.order_id} too"),
            ("sidecar", f"a process of its own, ready in {stage.ready_seconds * 1000:.0f} ms"),
        ):
            facts.add_row(name, Text(fact))
        self._title("One agent service, two tenants, a policy decision point beside it")
        self._console.print(facts)
        self._title("The request, tool by tool")

    def called(self, call: Call) -> None:
        """The five steps of a call of the main job."""
        if call.scene != MAIN.name:
            return
        table = Table(title=Text(call.action, "bold"), title_justify="left", expand=True)
        table.add_column("step", width=9)
        table.add_column("what happened", ratio=1)
        table.add_column("outcome", width=9)
        table.add_column("reason_code", no_wrap=True)
        table.add_column("ms", width=6, justify="right")
        for taken in call.steps:
            table.add_row(
                taken.step.capitalize(),
                Text(_story(call, taken)),
                Text(taken.outcome, _style(taken.outcome != DENIED)),
                taken.reason_code,
                "" if taken.seconds is None else f"{taken.seconds * 1000:.2f}",
            )
        self._console.print(table)

    def ended(self, scene: Scene, title: str, ending: Ending) -> None:
        """A line for each attack."""
        self._played.add(scene.name)
        if scene is MAIN:
            self._title("The attacks")
            self._row("", "attack", "stopped at", "reason_code", "what came of it", style="bold")
            return
        self._row(
            _mark(holds=ending.holds), title, _place(ending), ending.reason_code, ending.summary
        )

    def checked(self, checks: list[Check]) -> None:
        """The table of the checks, and the verdict."""
        played = [check for check in checks if check.name in self._played]
        as_expected = sum(check.holds for check in played)
        all_played = Check(
            "scenes",
            "every scene ended as it must",
            as_expected == len(played),
            f"{as_expected} of {len(played)}",
        )
        table = Table(expand=True)
        table.add_column("", width=6)
        table.add_column("check", ratio=1)
        table.add_column("found", ratio=1)
        for check in (all_played, *(check for check in checks if check not in played)):
            table.add_row(_mark(holds=check.holds), Text(check.title), Text(check.found))
        self._title("What is true now")
        self._console.print(table)
        failed = [check.name for check in checks if not check.holds]
        verdict = (
            f"FAILED: {', '.join(failed)}."
            if failed
            else f"All {len(checks)} checks hold: the tenant boundary works."
        )
        self._console.print(Text(f"\n{verdict}", f"bold {_style(not failed)}"))

    def _title(self, text: str) -> None:
        self._console.print(Text(f"\n{text}\n", "bold cyan"))

    def _row(self, mark: Text | str, *cells: str, style: str = "") -> None:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(width=6)
        for width in _ATTACK_COLUMNS:
            row.add_column(width=width, ratio=None if width else 1)
        row.add_row(mark, *(Text(cell) for cell in cells), style=style)
        self._console.print(row)


_ATTACK_COLUMNS: Final = (31, 10, 22, None)


def _story(call: Call, taken: StepTaken) -> str:
    """What a step of a call did, in a few words. Holds nothing secret."""
    decision = call.decision
    if decision is None:
        return "no identity was verified"
    match taken.step:
        case Step.IDENTIFY:
            return f"the token is {decision.actor}'s, of {decision.tenant}"
        case Step.ISOLATE:
            return f"everything below is {decision.tenant}'s alone"
        case Step.AUTHORIZE:
            return f"policy {decision.policy_revision[:16]}; holds {_held(decision)}"
        case Step.EXECUTE:
            return _result(call)
        case Step.AUDIT:
            return f"record {decision.audit_sequence}, written before the answer"


def _held(decision: Decision) -> str:
    held = [f"{amount} {unit} of {budget}" for budget, unit, amount in decision.charges]
    return ", ".join(held) or "nothing"


def _result(call: Call) -> str:
    if call.outcome != EXECUTED:
        return "the tool refused the permit"
    result = call.result or {}
    done = (
        f"mail sent to {result['sent_to']}"
        if "sent_to" in result
        else f"order #{result.get('order_id')} is {result.get('status')}"
    )
    return f"the tool verified the permit and used it up; {done}, by {call.tenant_id}'s own login"


def _place(ending: Ending) -> str:
    """Where the last call of a scene was stopped."""
    if ending.reason_code == ReasonCode.PDP_UNAVAILABLE:
        return "the stub"
    return (ending.calls[-1].stopped_at or "-") if ending.calls else "-"


def _mark(*, holds: bool) -> Text:
    return Text("ok" if holds else "FAILED", _style(holds))


def _style(good: bool) -> str:  # noqa: FBT001 - reads as a question
    return "green" if good else "red"
