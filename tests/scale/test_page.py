"""docs/scale.md says what the model and the measurements say."""

from __future__ import annotations

from dataclasses import fields

import pytest

from bench.scale import page
from bench.scale.model import Inputs

TEXT = page.PAGE.read_text(encoding="utf-8")
RESULTS = page.read()


def test_its_tables_are_what_the_model_gives() -> None:
    assert page.rendered(TEXT, RESULTS) == TEXT, "run python -m bench.scale.page"


def test_no_table_is_missing() -> None:
    assert sorted(page.shown(TEXT)) == sorted(page.TABLES)


def test_it_names_when_and_on_what_it_was_measured() -> None:
    assert RESULTS.whole["measured_on"] in TEXT
    assert RESULTS.whole["machine"] in TEXT


def test_every_input_is_explained() -> None:
    table = page.inputs_table(RESULTS)
    for field in fields(Inputs):
        assert f"`{field.name}`" in table


def test_a_fleet_of_fifty_sidecars_and_five_hundred_stubs_overspent_nothing() -> None:
    runs = RESULTS.whole["runs"]
    assert {run["plan"]["lease_seconds"] > 0 for run in runs} == {True, False}
    for run in runs:
        assert run["plan"]["sidecars"] >= 50
        assert run["plan"]["stubs"] >= 500
        assert run["faults"] == []
        assert run["refused"]["tenant_budget_exceeded"] > 0  # or nothing had been tried


CLOSE = (
    "looks at the store, per s",
    "looks at rest, per s",
    "operations on the store, per s",
    "audit of the calls",
    "bytes of a release",
)
"""What is counted, and does not depend on how busy the machine is."""


@pytest.mark.parametrize("run", RESULTS.whole["runs"], ids=("exact", "leased"))
def test_the_model_is_close_to_what_a_fleet_did(run: dict[str, object]) -> None:
    rows = {
        name: (measured, said) for name, measured, said, _ in page.compared(RESULTS.inputs, run)
    }
    for name in CLOSE:
        measured, said = rows[name]
        assert said == pytest.approx(measured, rel=0.15), name
