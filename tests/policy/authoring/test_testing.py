"""The Rego tests of a bundle run in both engines, and a difference shows."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pdp.policy.authoring import testing
from pdp.policy.authoring.testing import (
    Outcome,
    Ran,
    Result,
    run_in_both_engines,
    run_tests,
)
from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError

RULES = """package pdp.small

allow if input.x == 1

next(x) := x + 1

second := next(1)

clock := time.now_ns()

limit := data.limit
"""
ASKED = """package pdp.small_test

import data.pdp.small

"""


def results_of(opa: Path, tests: str, *, rules: str = RULES) -> dict[str, Result]:
    report = run_in_both_engines(library(tests, rules=rules), opa=opa)
    return {result.name.rsplit(".", 1)[-1]: result for result in report.results}


def library(tests: str, *, rules: str = RULES) -> Bundle:
    rego = {"pdp/small/small.rego": rules, "pdp/small/small_test.rego": ASKED + tests}
    return Bundle(revision="r", data=b'{"limit": 5}', rego=rego, wasm=None)


def test_the_starter_bundle_passes_in_both_engines(starter: Bundle, opa: Path) -> None:
    report = run_in_both_engines(starter, opa=opa, with_coverage=True)

    assert len(report.results) >= 25
    assert {result.opa.outcome for result in report.results} == {Outcome.PASSED}
    assert {result.embedded.outcome for result in report.results} == {Outcome.PASSED}
    assert report.failures == []
    assert report.coverage is not None
    assert report.coverage.percent == 100.0


def test_mocks_of_functions_built_ins_rules_and_data_run_in_both_engines(opa: Path) -> None:
    results = results_of(
        opa,
        """
test_function if {
	second := small.second with small.next as 7
	second == 7
}

test_built_in if {
	clock := small.clock with time.now_ns as 5
	clock == 5
}

test_data if {
	limit := small.limit with data.limit as 9
	limit == 9
}

test_rule if {
	limit := small.limit with small.limit as 3
	limit == 3
}
""",
    )

    assert {result.opa.outcome for result in results.values()} == {Outcome.PASSED}
    ran = {name: result.embedded.outcome for name, result in results.items()}
    assert ran | {"test_built_in": Outcome.PASSED} == dict.fromkeys(results, Outcome.PASSED)


def test_a_failing_test_is_told_with_its_place(opa: Path) -> None:
    tests = "test_it if small.allow with input as {}\n\ntest_other if small.second == 2\n"

    failures = run_tests(library(tests), opa=opa)

    assert [str(failure) for failure in failures] == [
        "pdp/small/small_test.rego:5: data.pdp.small_test.test_it failed"
    ]


def test_each_case_of_a_test_counts(opa: Path) -> None:
    results = results_of(
        opa,
        """
test_cases[name] if {
	some name, x in {"one": 1, "two": 2}
	small.allow with input as {"x": x}
}

test_nested[outer][inner] if {
	some outer in ["a", "b"]
	some inner in ["u", "v"]
	outer != "b"
}

test_none[name] if {
	some name, x in {}
	x == 1
}
""",
    )

    for engine in ("opa", "embedded"):
        ran = {name: getattr(result, engine) for name, result in results.items()}
        assert ran["test_cases"] == Ran(outcome=Outcome.FAILED, failed_cases=("two",))
        assert ran["test_nested"] == Ran(outcome=Outcome.FAILED, failed_cases=("b/u", "b/v"))
        assert ran["test_none"] == Ran(outcome=Outcome.PASSED)


def test_what_is_to_be_done_is_skipped_and_no_failure(opa: Path) -> None:
    bundle = library("todo_test_it if false\n")

    report = run_in_both_engines(bundle, opa=opa)

    assert [result.embedded.outcome for result in report.results] == [Outcome.SKIPPED]
    assert report.failures == []


def test_what_the_embedded_engine_can_not_run_is_named_and_the_rest_runs(opa: Path) -> None:
    results = results_of(
        opa,
        """
test_runtime if opa.runtime()

test_one if small.second == 2

test_two if small.limit == 5
""",
    )

    assert results["test_runtime"].opa.outcome is Outcome.PASSED
    assert results["test_runtime"].embedded.outcome is Outcome.NOT_RUN
    assert "opa.runtime" in results["test_runtime"].embedded.note
    assert "pdp/small/small_test.rego" in results["test_runtime"].embedded.note
    assert not results["test_runtime"].is_failure
    assert not results["test_runtime"].engines_differ
    assert results["test_one"].embedded.outcome is Outcome.PASSED
    assert results["test_two"].embedded.outcome is Outcome.PASSED


def test_two_tests_of_one_name_are_run_one_by_one_in_opa_only(opa: Path) -> None:
    results = results_of(opa, "test_it if small.second == 2\n\ntest_it if small.second == 3\n")

    assert results["test_it"].opa.outcome is Outcome.PASSED
    assert results["test_it#01"].opa.outcome is Outcome.FAILED
    assert {result.embedded.note for result in results.values()} == {
        "another test has the same name"
    }


def test_an_error_within_a_test_fails_in_both_engines(opa: Path) -> None:
    results = results_of(opa, "test_it if {\n\tsmall.limit with small.limit as input.x\n}\n")
    assert results["test_it"].is_failure

    conflict = RULES + "\ntwo := 1 if input.x\n\ntwo := 2 if input.y\n"
    results = results_of(
        opa, 'test_it if small.two == 1 with input as {"x": 1, "y": 1}\n', rules=conflict
    )
    assert results["test_it"].opa.outcome is Outcome.FAILED
    assert (
        "two produced conflicting values: 1 at pdp/small/small.rego:" in results["test_it"].opa.note
    )
    assert results["test_it"].embedded == Ran(outcome=Outcome.FAILED, note="an error")


def test_a_test_that_runs_away_fails_and_keeps_nobody(
    opa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "TEST_TIMEOUT_SECONDS", 1)
    endless = (
        "test_it if count([1 |\n\tsome i in numbers.range(1, 30000)\n"
        "\tsome j in numbers.range(1, 30000)\n\ti * j == 0\n]) == 1\n"
    )

    results = results_of(opa, endless)

    assert results["test_it"].opa.note == "longer than 5 seconds"
    assert results["test_it"].embedded.note == "longer than 5 seconds"


def test_no_test_reaches_the_network(opa: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        call = f'http.send({{"method": "get", "url": "{url}", "raise_error": false}})'

        results = results_of(opa, f"test_it if {call}.status_code == 200\n")

        assert results["test_it"].opa.outcome is Outcome.FAILED
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_test_sees_the_environment(opa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDP_SECRET", "hidden")

    results = results_of(opa, 'test_it if opa.runtime().env.PDP_SECRET == "hidden"\n')

    assert results["test_it"].opa.outcome is Outcome.FAILED


def test_a_difference_between_the_engines_is_a_failure_that_says_so(
    starter: Bundle, opa: Path
) -> None:
    report = run_in_both_engines(starter, opa=opa)
    result = dataclasses.replace(report.results[0], embedded=Ran(outcome=Outcome.FAILED, note="x"))

    (failure,) = dataclasses.replace(report, results=(result,)).failures

    assert result.engines_differ
    assert failure.what.endswith("passed in a real OPA, failed (x) in the embedded engine")


def test_other_cases_that_fail_are_a_difference() -> None:
    result = Result(
        file="a_test.rego",
        row=1,
        name="data.a_test.test_it",
        opa=Ran(outcome=Outcome.FAILED, failed_cases=("one",)),
        embedded=Ran(outcome=Outcome.FAILED, failed_cases=("two",)),
    )

    assert result.engines_differ


def test_a_bundle_without_tests_does_not_pass(opa: Path) -> None:
    bundle = Bundle(revision="r", data=b"{}", rego={"a.rego": "package a\n\nb := 1\n"}, wasm=None)

    failures = run_tests(bundle, opa=opa)

    assert [str(failure) for failure in failures] == ["*_test.rego: the bundle holds no test"]


def test_a_bundle_that_only_a_real_opa_runs_is_tested_there(
    build_policy: Callable[[Mapping[str, str]], Bundle], opa: Path
) -> None:
    rego = {
        "pdp/authz/authz.rego": "package pdp.authz\n\ndecision := opa.runtime()\n",
        "pdp/budget/budget.rego": "package pdp.budget\n\ndecision := {}\n\nlimits := []\n",
        "pdp/authz/authz_test.rego": "package pdp.authz_test\n\ntest_it if true\n",
    }
    bundle = build_policy(rego)

    report = run_in_both_engines(bundle, opa=opa)

    assert report.failures == []
    (result,) = report.results
    assert result.embedded.outcome is Outcome.NOT_RUN
    assert "opa.runtime" in result.embedded.note


def test_rego_that_does_not_compile_can_not_be_tested(opa: Path) -> None:
    with pytest.raises(BundleError, match=r"(?s)can not be run:.*small_test.rego:5.*y is unsafe"):
        run_tests(library("test_it if y\n"), opa=opa)


def test_past_its_time_the_embedded_engine_runs_no_more(starter: Bundle, opa: Path) -> None:
    moments = iter([0.0])

    report = run_in_both_engines(starter, opa=opa, clock=lambda: next(moments, 1000.0))

    assert {result.embedded.note for result in report.results} == {"there was no time left for it"}
    assert report.failures == []


def test_lines_that_no_test_reaches_are_named(opa: Path) -> None:
    bundle = library("test_it if small.second == 2\n")

    report = run_in_both_engines(bundle, opa=opa, with_coverage=True)

    assert report.coverage is not None
    assert report.coverage.missed == {"pdp/small/small.rego": (3, 9, 11)}
    assert report.coverage.percent == 40.0
