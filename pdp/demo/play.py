"""The whole demonstration, from the first call to the last check."""

from __future__ import annotations

from collections.abc import Sequence

from pdp.demo.checks import Check, check_all, read_budgets
from pdp.demo.planner import Plan
from pdp.demo.scenes import ATTACKS, MAIN, OUTAGE, Ending, Scene
from pdp.demo.show import Show
from pdp.demo.stage import Stage, set_stage
from pdp.demo.tenants import Tenant
from pdp.errors import PdpError


def play(
    request: str, plan: Plan, tenant: Tenant, show: Show, *, attacks: Sequence[Scene] = ATTACKS
) -> bool:
    """Play the main job, the attacks and the outage; whether every check holds.

    ``plan`` is what ``request`` comes to. Raises StageError when the sidecar does
    not start.
    """
    with set_stage(plan, tenant, listener=show.called) as stage:
        show.opened(stage, request)
        checks = [_play(MAIN, stage, show)]
        checks += [_play(attack, stage, show) for attack in attacks]
        budgets = read_budgets(stage)
        checks.append(_play(OUTAGE, stage, show))
        checks += check_all(stage, budgets)
        show.checked(checks)
    return all(check.holds for check in checks)


def _play(scene: Scene, stage: Stage, show: Show) -> Check:
    """Play one scene; whether it ended as it must."""
    stage.recorder.scene = scene.name
    try:
        ending = scene.play(stage)
    except PdpError as error:
        ending = Ending((), holds=False, note=f"could not be played: {error.reason_code}")
    title = scene.title.format(other=stage.other.id)
    show.ended(scene, title, ending)
    return Check(scene.name, title, ending.holds, ending.summary)
