"""docs/benchmarks.md says what was measured, and measuring works."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.peers import page
from bench.peers.__main__ import every_server
from bench.peers.measure import Level, Plan, measure
from bench.peers.systems import SYSTEMS, System
from bench.peers.tenants import tokens
from pdp.testing import TokenIssuer

TEXT = page.PAGE.read_text(encoding="utf-8")
RESULTS = page.read()
TINY = Plan(levels=(Level(1, 2, 12), Level(8, 1, 16)), warm_up=4, starts=1, idle_seconds=0.1)


def run(systems: Sequence[System], folder: Path) -> dict[str, object]:
    issuer = TokenIssuer()
    return measure(
        systems,
        every_server(folder, issuer),
        TINY,
        folder,
        tokens=tokens(issuer),
        show=lambda _what: None,
    )


def test_its_tables_are_what_was_measured() -> None:
    assert page.rendered(TEXT, RESULTS) == TEXT, "run python -m bench.peers.page"


def test_its_plots_are_what_was_measured() -> None:
    for name, plot in page.plots(RESULTS).items():
        assert (page.RESULTS / name).read_text(encoding="utf-8") == plot
        assert f"(benchmarks/{name})" in TEXT


def test_no_table_is_missing() -> None:
    assert sorted(page.shown(TEXT)) == sorted(page.TABLES)


def test_every_system_that_can_be_asked_was() -> None:
    assert sorted(RESULTS.peers["systems"]) == sorted(system.name for system in SYSTEMS)


def test_a_target_that_is_not_reached_is_called_missed() -> None:
    (missed, *_), (met, *_), unknown = (
        page.Target(what="w", most=0.8, reached=reached).row()[::-1] for reached in (1.0, 0.4, None)
    )
    assert missed == "**missed**, by 25%"
    assert met == "met, by 50%"
    assert unknown[0] == "not measured"


def test_a_ratio_is_that_of_the_turns_which_both_took() -> None:
    def took(*slices: float) -> dict[str, object]:
        return {"levels": {"1": {"slice_p50_us": slices}}}

    # The machine was slow in the second turn, and hit both.
    results = replace(
        RESULTS, peers={"systems": {"one": took(100, 400, 110), "two": took(200, 800, 220)}}
    )
    assert results.ratio("one", "two") == pytest.approx(0.5)


def test_a_system_that_allows_what_is_to_be_denied_is_not_measured(tmp_path: Path) -> None:
    lax = System(name="lax", title="", asker="tests.bench.strangers:AllowsAll", group="peers")
    with pytest.raises(RuntimeError, match="lax answers True to a tenant that is not known"):
        run([lax], tmp_path)


def test_a_system_that_fails_is_not_passed_over(tmp_path: Path) -> None:
    broken = System(name="broken", title="", asker="tests.bench.strangers:Fails", group="peers")
    with pytest.raises(RuntimeError, match="no answer today"):
        run([broken], tmp_path)


@pytest.mark.slow
def test_ours_can_be_measured_stage_by_stage_and_whole(tmp_path: Path) -> None:
    ours = [system for system in SYSTEMS if system.server in {"stages", "ours"}]
    found = json.loads(json.dumps(run(ours, tmp_path)))
    assert sorted(found["systems"]) == sorted(system.name for system in ours)
    for system in found["systems"].values():
        assert system["levels"]["1"]["calls"] == 24
        assert 0 < system["levels"]["1"]["p50_us"] <= system["levels"]["1"]["p999_us"]
    assert found["servers"]["ours"]["resident_bytes"] > 0
