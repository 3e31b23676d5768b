"""OPA's own conformance cases, in the embedded engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pdp.policy.bundle import Bundle
from pdp.policy.compile import compile_rego
from pdp.policy.engine import BundleError
from pdp.policy.wasm import WasmEvaluator
from tests.conformance import opa_cases, report
from tests.conformance.embedded import Finding, Outcome, run
from tests.conformance.opa_cases import CasesMissingError, find_cases, read_cases

LEAST_PASSED = 0.95
"""Of the cases that need nothing of what is never lent."""


@pytest.fixture(scope="session")
def findings() -> Sequence[Finding]:
    if not report.OPA.exists():
        pytest.fail("there is no .tools/opa; `make test` installs it")
    try:
        place = find_cases()
    except CasesMissingError as error:
        pytest.fail(str(error))
    return run(read_cases(place), report.OPA)


def test_no_case_differs_without_a_reason_that_is_written_down(
    findings: Sequence[Finding],
) -> None:
    differing = {
        (finding.case.folder, finding.case.note): finding.said
        for finding in findings
        if finding.outcome is Outcome.DIFFERS
    }
    explained = report.explained()
    assert {key: differing[key] for key in differing.keys() - explained.keys()} == {}
    assert explained.keys() - differing.keys() == set(), "they differ no more"


def test_a_builtin_is_lent_only_where_all_cases_for_it_pass(findings: Sequence[Finding]) -> None:
    assert [
        (sorted(finding.lent), finding.case.note)
        for finding in findings
        if finding.outcome is Outcome.DIFFERS and finding.lent
    ] == []


def test_nearly_all_cases_pass_but_for_what_is_never_lent(findings: Sequence[Finding]) -> None:
    inside = [finding for finding in findings if not report.is_outside(finding)]
    passed = sum(finding.outcome is Outcome.PASSED for finding in inside)
    assert passed >= LEAST_PASSED * len(inside)


def test_the_report_in_docs_engines_is_current(findings: Sequence[Finding]) -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.page_with(page, findings), (
        "write it anew: python -m tests.conformance.report"
    )


@pytest.mark.parametrize(
    ("name", "call"),
    (
        ("http.send", 'http.send({"method": "get", "url": input.url})'),
        ("io.jwt.decode", "io.jwt.decode(input.token)"),
        ("crypto.sha256", "crypto.sha256(input.text)"),
        ("rand.intn", "rand.intn(input.name, 9)"),
        ("opa.runtime", "opa.runtime()"),
    ),
)
def test_what_is_never_lent_is_refused_at_load_by_its_name(name: str, call: str) -> None:
    rego = {"p.rego": f"package p\n\nq := {call}\n"}
    bundle = Bundle(
        revision="r",
        data=b"{}",
        rego=rego,
        wasm=compile_rego(rego, b"{}", opa=report.OPA, entrypoints=["p/q"]),
    )
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        WasmEvaluator(bundle, entrypoints=["p/q"])


def test_one_is_told_how_to_get_the_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(opa_cases, "_UNPACKED", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CasesMissingError, match=r"go mod download .*opa@v1\.22\.2"):
        find_cases()
