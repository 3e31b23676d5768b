from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from pdp.policy.analysis.cases import Cases, parse_cases
from pdp.policy.analysis.matrix import Cell, matrix
from pdp.policy.analysis.matrix_output import (
    write_matrix_csv,
    write_matrix_json,
    write_matrix_page,
)
from pdp.policy.analysis.questions import Estate, Only, Questionnaire
from pdp.policy.bundle import Bundle
from tests.policy.analysis.small import LEAKY, changed, no_progress

HOSTILE = '=cmd|"/c calc"!A1</title><script>alert(1)</script>'


def cells_of(bundle: Bundle, cases: Cases = Cases(), only: Only = Only()) -> list[Cell]:  # noqa: B008 - both are frozen
    return list(matrix(bundle, cases, only, processes=1, progress=no_progress))


def test_every_tenant_role_and_tool_has_a_cell(starter: Bundle) -> None:
    answers = {
        (cell.tenant, cell.role, cell.tool): cell.answer for cell in cells_of(changed(starter))
    }
    assert {key: answer.reason_code for key, answer in answers.items()} == {
        ("acme", "reader", "notes.read"): "ok",
        ("acme", "reader", "notes.write"): "role_not_allowed",
        ("acme", "writer", "notes.read"): "ok",
        ("acme", "writer", "notes.write"): "ok",
        ("globex", "reader", "notes.read"): "ok",
        ("globex", "reader", "notes.write"): "tool_not_allowed",
    }
    (charge,) = answers["acme", "writer", "notes.write"].charges
    assert (charge.budget, charge.unit, charge.amount) == ("tools", "calls", 1)


def test_it_is_narrowed_by_name(starter: Bundle) -> None:
    only = Only(
        tenants=frozenset({"acme"}), roles=frozenset({"writer"}), tools=frozenset({"notes.write"})
    )
    (cell,) = cells_of(changed(starter), only=only)
    assert cell.answer.allow


def test_cases_decide_over_arguments_roles_and_scopes(starter: Bundle) -> None:
    text = b"tools: {notes.write: [{arguments: {kind: memo}}, {name: bad, arguments: {kind: x}}]}"
    cells = cells_of(changed(starter), parse_cases(text, place="c"))
    assert {
        cell.case: cell.answer.reason_code
        for cell in cells
        if (cell.tenant, cell.role, cell.tool) == ("acme", "writer", "notes.write")
    } == {"1": "ok", "bad": "argument_not_allowed"}
    without = parse_cases(b"roles: [writer]\nscopes: []", place="c")
    assert {cell.answer.reason_code for cell in cells_of(changed(starter), without)} == {
        "scope_missing",
        "tool_not_allowed",
        "role_not_allowed",
    }


def test_a_tenant_without_roles_is_asked_about_too(starter: Bundle) -> None:
    bundle = changed(starter, lambda data: data["tenants"]["globex"].pop("roles"))
    assert [cell.role for cell in cells_of(bundle) if cell.tenant == "globex"] == ["", ""]


def test_garbage_in_the_data_is_a_denial_and_no_crash(starter: Bundle) -> None:
    def garbage(data: dict[str, dict[str, object]]) -> None:
        data["tenants"] |= {"text": "x", "list": [], "odd": {"roles": [], "scopes": {"a": 1}}}
        data["tools"] |= {"odd": 1}

    bundle = changed(starter, garbage)
    odd = [c for c in cells_of(bundle) if c.tenant in {"text", "list", "odd"} or c.tool == "odd"]
    assert len(odd) == 12
    assert not any(cell.answer.allow for cell in odd)


def test_several_processes_give_the_same_in_the_same_order(
    starter: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many(data: dict[str, dict[str, object]]) -> None:
        data["tenants"] |= {f"t{number}": data["tenants"]["acme"] for number in range(30)}

    bundle = changed(starter, many)
    one = cells_of(bundle)
    monkeypatch.setattr("pdp.policy.analysis.matrix.FEW_QUESTIONS", 0)
    two = list(matrix(bundle, Cases(), Only(), processes=2, progress=no_progress))
    assert one == two
    assert len(one) == 31 * 4 + 2


def test_an_answer_that_is_none_is_the_denial_that_the_sidecar_makes_of_it(
    build_policy: Callable[..., Bundle],
) -> None:
    authz = """package pdp.authz

decision := {"allow": 1} if input.action.name == "invalid"

decision := {"allow": false, "reason_code": "a"} if input.action.name == "conflict"

decision := {"allow": false, "reason_code": "b"} if input.action.name == "conflict"
"""
    data: dict[str, Any] = {
        "tenants": {"t": {}},
        "tools": {"invalid": {}, "conflict": {}, "undefined": {}},
    }
    bundle = build_policy({**LEAKY, "pdp/authz/authz.rego": authz, "data.json": data})
    assert {cell.tool: cell.answer.reason_code for cell in cells_of(bundle)} == {
        "invalid": "policy_invalid",
        "conflict": "policy_error",
        "undefined": "policy_undefined",
    }


def test_progress_ends_at_the_whole(starter: Bundle) -> None:
    told: list[tuple[int, int]] = []
    list(
        matrix(
            changed(starter),
            Cases(),
            Only(),
            processes=1,
            progress=lambda done, total: told.append((done, total)),
        )
    )
    assert told[-1] == (2, 2)


def test_a_tool_whose_arguments_can_not_be_made_is_named(starter: Bundle) -> None:
    def pattern(data: dict[str, dict[str, dict[str, object]]]) -> None:
        data["tools"]["notes.read"]["arguments"] = {"d": {"type": "string", "pattern": "q{9}"}}

    estate = Estate(changed(starter, pattern).data)
    assert list(Questionnaire([estate], Cases(), Only()).without_case()) == ["notes.read"]
    cases = parse_cases(b"tools: {notes.read: [{arguments: {d: qqqqqqqqq}}]}", place="c")
    assert Questionnaire([estate], cases, Only()).without_case() == {}


def test_each_question_is_that_of_a_workload_that_may_ask_it(starter: Bundle) -> None:
    def list_workloads(data: Any) -> None:
        data["workloads"] = {
            "reader": {"tools": ["notes.read"]},
            "writer": {"tools": ["notes.write"], "tenants": ["acme"]},
        }

    without, listed = cells_of(changed(starter)), cells_of(changed(starter, list_workloads))
    assert [cell.answer for cell in without] == [cell.answer for cell in listed]

    def demand(data: Any) -> None:
        data["tenants"]["acme"]["workloads"] = ["stranger"]
        data["tenants"]["globex"]["workloads"] = "slip"

    own = cells_of(changed(starter, demand))
    assert [cell.answer.allow for cell in own if cell.tenant == "acme"] == [
        cell.answer.allow for cell in without if cell.tenant == "acme"
    ]
    assert not any(cell.answer.allow for cell in own if cell.tenant == "globex")

    def exclude(data: Any) -> None:
        list_workloads(data)
        demand(data)

    assert not any(cell.answer.allow for cell in cells_of(changed(starter, exclude)))


def hostile_cells(starter: Bundle) -> list[Cell]:
    def rename(data: dict[str, dict[str, object]]) -> None:
        data["tenants"] = {HOSTILE: data["tenants"]["acme"], "-1+1": data["tenants"]["globex"]}

    return cells_of(changed(starter, rename))


def test_a_spreadsheet_takes_no_name_for_a_formula(starter: Bundle) -> None:
    out = io.StringIO()
    write_matrix_csv(out, hostile_cells(starter))
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert {row["tenant"] for row in rows} == {f"'{HOSTILE}", "'-1+1"}
    assert {row["decision"] for row in rows} == {"allow", "deny"}
    assert "tools 1 calls" in {row["charges"] for row in rows}


def test_a_page_shows_a_hostile_name_and_runs_none_of_it(starter: Bundle) -> None:
    out = io.StringIO()
    write_matrix_page(out, hostile_cells(starter), revision=HOSTILE)
    page = out.getvalue()
    assert page.count("<script>") == 1
    assert page.count("</title>") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)\s*=|https?:""", page.replace("default-src", ""))


def test_json_has_one_object_a_line(starter: Bundle) -> None:
    out = io.StringIO()
    write_matrix_json(out, cells_of(changed(starter)))
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(rows) == 6
    assert rows[0]["allow"] is True
    assert rows[0]["scopes"] == ["notes:read"]
