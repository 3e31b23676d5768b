"""The Rego tests of a bundle, in a real OPA and in the embedded engine.

Both must agree on every test: the sidecar decides with one of them, and a test that
only the other passes says nothing about it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pdp.canonical import JsonValue
from pdp.policy.authoring.command import Done, run
from pdp.policy.authoring.sources import folder_of, opa_sources
from pdp.policy.bundle import Bundle
from pdp.policy.compile import compile_rego
from pdp.policy.engine import BundleError, PolicyError
from pdp.policy.part import is_test
from pdp.policy.wasm import WasmEvaluator
from pdp.reason import ReasonCode

TEST_TIMEOUT_SECONDS: Final = 5
"""Longest time for one test, in each engine."""
ALL_TESTS_TIMEOUT_SECONDS: Final = 120.0
"""Longest time for all tests, in each engine."""
MEMORY_MAX_MIB: Final = 2_048
_TESTS_FAILED: Final = 2
"""What `opa test` exits with when it could run the tests."""
_STEP: Final = re.compile(r'\.(\w+)|\[("(?:[^"\\]|\\.)*")\]', re.ASCII)


class Outcome(StrEnum):
    """How a test went in one engine."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Its name begins with todo_."""
    NOT_RUN = "not run"
    """This engine can not run it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a test went in one engine, and why where that is known."""

    outcome: Outcome
    failed_cases: tuple[str, ...] = ()
    """Of a test that has cases: those that failed."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One test rule."""

    file: str
    row: int
    name: str
    """With its package: data.pdp.authz_test.test_reading_is_free."""
    opa: Ran
    embedded: Ran

    @property
    def engines_differ(self) -> bool:
        """Whether both engines ran it, and not with the same outcome."""
        if Outcome.NOT_RUN in {self.opa.outcome, self.embedded.outcome}:
            return False
        return (self.opa.outcome, self.opa.failed_cases) != (
            self.embedded.outcome,
            self.embedded.failed_cases,
        )

    @property
    def is_failure(self) -> bool:
        """Whether either engine fails it."""
        return Outcome.FAILED in {self.opa.outcome, self.embedded.outcome}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Which lines of the Rego, its tests left out, the tests reach."""

    covered: int
    """Lines that some test reaches."""
    missed: Mapping[str, tuple[int, ...]]
    """By file: lines that no test reaches."""

    @property
    def percent(self) -> float:
        """Of all lines that can be reached; 100 where there are none."""
        lines = self.covered + sum(map(len, self.missed.values()))
        return 100 * self.covered / lines if lines else 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A test that does not pass; ``str()`` of it is one line."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How all tests of a bundle went."""

    results: tuple[Result, ...]
    coverage: Coverage | None = None
    """None when it was not asked for, or a test failed in OPA."""

    @property
    def failures(self) -> list[Failure]:
        """What does not pass, one for each test."""
        return [_failure(result) for result in self.results if result.is_failure]


def run_tests(bundle: Bundle, *, opa: Path) -> list[Failure]:
    """The tests that a bundle carries and does not pass, in OPA or in the embedded engine.

    That there is no test at all is a failure too: who took them out must not pass. It
    ends within about four minutes; a test that takes longer than its share fails. No test
    reaches the network. Raises BundleError when the tests can not be run.
    """
    done = run_in_both_engines(bundle, opa=opa)
    if not done.results:
        return [Failure(place="*_test.rego", what="the bundle holds no test")]
    return done.failures


def run_in_both_engines(
    bundle: Bundle,
    *,
    opa: Path,
    with_coverage: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Run every test in both engines. Raises BundleError when they can not be run."""
    tests = _in_opa(bundle, opa)
    wanted = [test for test in tests if test.ran.outcome is not Outcome.SKIPPED]
    embedded = _in_embedded_engine(bundle, wanted, opa, clock)
    results = tuple(
        Result(
            file=test.file,
            row=test.row,
            name=test.name,
            opa=test.ran,
            embedded=embedded.get(test.name, test.ran),
        )
        for test in tests
    )
    coverage = None
    if with_coverage and not any(test.ran.outcome is Outcome.FAILED for test in tests):
        coverage = _coverage(bundle, opa)
    return Report(results=results, coverage=coverage)


def _failure(result: Result) -> Failure:
    if result.engines_differ:
        what = f"{_told(result.opa)} in a real OPA, {_told(result.embedded)} in the embedded engine"
    elif result.opa.outcome is Outcome.FAILED:
        what = _told(result.opa)
    else:
        what = f"{_told(result.embedded)} in the embedded engine"
    return Failure(place=f"{result.file}:{result.row}", what=f"{result.name} {what}")


def _told(ran: Ran) -> str:
    told = str(ran.outcome)
    if ran.failed_cases:
        told += f" for {', '.join(ran.failed_cases)}"
    return f"{told} ({ran.note})" if ran.note else told


# A real OPA


@dataclass(frozen=True, slots=True, kw_only=True)
class _Test:
    """What `opa test` says of one test."""

    file: str
    row: int
    name: str
    ran: Ran
    cases: Mapping[str, Any]
    """Its cases by name, each with a "fail" or "sub_results" of its own."""


def _in_opa(bundle: Bundle, opa: Path) -> list[_Test]:
    done = _opa_test(bundle, opa)
    if done.code not in {0, _TESTS_FAILED}:
        raise BundleError(
            ReasonCode.POLICY_UNAVAILABLE,
            f"The tests of the policy bundle can not be run:\n{done.errors.strip()}",
        )
    listed: Any = done.json() or []
    return sorted(map(_test, listed), key=lambda test: (test.file, test.row, test.name))


def _opa_test(bundle: Bundle, opa: Path, *options: str) -> Done:
    with (
        folder_of(opa_sources(bundle.rego, bundle.data)) as folder,
        folder_of({_CAPABILITIES: _without_network(opa)}) as beside,
    ):
        options = (
            *("--format", "json", "--capabilities", str(beside / _CAPABILITIES)),
            *("--timeout", f"{TEST_TIMEOUT_SECONDS}s"),
            *options,
        )
        return run(
            opa,
            ["test", "--bundle", ".", *options],
            folder=folder,
            timeout_seconds=ALL_TESTS_TIMEOUT_SECONDS,
        )


_CAPABILITIES: Final = "capabilities.json"


def _without_network(opa: Path) -> bytes:
    """OPA's capabilities without hosts to reach: a test needs none, and the sidecar that
    runs it may reach more than its author.
    """
    with folder_of({}) as folder:
        capabilities: Any = run(opa, ["capabilities", "--current"], folder=folder).json()
    return json.dumps({**capabilities, "allow_net": []}).encode()


def _test(listed: dict[str, Any]) -> _Test:
    error, cases = listed.get("error"), listed.get("sub_results") or {}
    outcome = Outcome.PASSED
    note = ""
    if listed.get("skip"):
        outcome = Outcome.SKIPPED
    elif error:
        outcome, note = Outcome.FAILED, _told_of_error(error)
    elif listed.get("fail"):
        outcome = Outcome.FAILED
    failed_cases = tuple(sorted(_failed_cases(cases)))
    return _Test(
        file=listed["location"]["file"],
        row=listed["location"]["row"],
        name=f"{listed['package']}.{listed['name']}",
        ran=Ran(outcome=outcome, failed_cases=failed_cases, note=note),
        cases=cases,
    )


_TOO_LONG: Final = f"longer than {TEST_TIMEOUT_SECONDS} seconds"
_ERROR: Final = "an error"
MAX_ERROR_LENGTH: Final = 500
"""Characters that are shown of what OPA says of a test that ends with an error."""


def _told_of_error(error: Any) -> str:  # noqa: ANN401 - whatever OPA wrote
    """What OPA says of it, on one line: of two values of a rule, both and their places."""
    if not isinstance(error, dict):
        return _ERROR
    if error.get("code") == "eval_cancel_error":
        return _TOO_LONG
    return " ".join(str(error.get("message") or _ERROR).split())[:MAX_ERROR_LENGTH]


def _failed_cases(cases: Mapping[str, Any]) -> Iterator[str]:
    for name, result in cases.items():
        below = result.get("sub_results")
        if below:
            yield from (f"{name}/{case}" for case in _failed_cases(below))
        elif result.get("fail"):
            yield name


def _coverage(bundle: Bundle, opa: Path) -> Coverage:
    report: Any = _opa_test(bundle, opa, "--coverage").json()
    covered, missed = 0, {}
    for file, lines in sorted(report["files"].items()):
        if is_test(file):
            continue
        reached = _rows(lines.get("covered") or ())
        never = _rows(lines.get("not_covered") or ()) - reached
        covered += len(reached)
        if never:
            missed[file] = tuple(sorted(never))
    return Coverage(covered=covered, missed=missed)


def _rows(ranges: Iterable[dict[str, Any]]) -> set[int]:
    return {row for each in ranges for row in range(each["start"]["row"], each["end"]["row"] + 1)}


# The embedded engine: each test is an entrypoint of its own.


def _in_embedded_engine(
    bundle: Bundle, tests: Sequence[_Test], opa: Path, clock: Callable[[], float]
) -> dict[str, Ran]:
    """How each test went, by its name."""
    if not tests:
        return {}
    ran: dict[str, Ran] = {}
    asked: dict[str, _Test] = {}
    names = {test.name for test in tests}
    for test in tests:
        entrypoint = _entrypoint(test.name)
        if entrypoint is None:
            ran[test.name] = _not_run("its package has a name that can be no entrypoint")
        elif "#" in test.name or f"{test.name}#01" in names:
            # OPA takes the rules of one name one by one, the embedded engine all together.
            ran[test.name] = _not_run("another test has the same name")
        else:
            asked[entrypoint] = test
    refusal = _refusal(bundle, opa)
    if refusal is not None:
        return ran | {test.name: _not_run(refusal) for test in asked.values()}
    end = clock() + ALL_TESTS_TIMEOUT_SECONDS
    return ran | _Embedded(bundle, opa, lambda: clock() > end).run(asked)


def _refusal(bundle: Bundle, opa: Path) -> str | None:
    """Why the embedded engine can not run this bundle at all, if so."""
    try:
        wasm = bundle.wasm or compile_rego(bundle.rego, bundle.data, opa=opa)
    except BundleError:
        return None  # no bundle for the sidecar, but a library, whose tests can be run
    try:
        WasmEvaluator(replace(bundle, wasm=wasm), memory_max_mib=MEMORY_MAX_MIB).close()
    except BundleError as error:
        return error.message
    return None


def _not_run(why: str) -> Ran:
    return Ran(outcome=Outcome.NOT_RUN, note=why)


def _entrypoint(name: str) -> str | None:
    steps = [plain or json.loads(quoted) for plain, quoted in _STEP.findall(name)]
    return None if any("/" in step for step in steps) else "/".join(steps)


class _Embedded:
    """Runs tests in the embedded engine. Where it can not load all of them together, it
    halves them until those are alone that it can not load.
    """

    def __init__(self, bundle: Bundle, opa: Path, is_over: Callable[[], bool]) -> None:
        self._bundle = bundle
        # The compiler leaves out what is named as tests; here they are what is asked.
        self._rego = {
            f"{name.removesuffix('.rego')}_.rego" if is_test(name) else name: text
            for name, text in bundle.rego.items()
        }
        self._opa = opa
        self._is_over = is_over

    def run(self, tests: Mapping[str, _Test]) -> dict[str, Ran]:
        """How each test went, by its name. They are given by their entrypoints."""
        if not tests or self._is_over():
            return {test.name: _not_run(_NO_TIME) for test in tests.values()}
        try:
            with self._evaluator(list(tests)) as evaluator:
                return {
                    test.name: self._ask(evaluator, entrypoint, test)
                    for entrypoint, test in tests.items()
                }
        except BundleError as error:
            items = list(tests.items())
            if len(items) == 1:
                return {test.name: _not_run(error.message) for test in tests.values()}
        half = len(items) // 2
        return self.run(dict(items[:half])) | self.run(dict(items[half:]))

    def _evaluator(self, entrypoints: Sequence[str]) -> WasmEvaluator:
        wasm = compile_rego(self._rego, self._bundle.data, opa=self._opa, entrypoints=entrypoints)
        return WasmEvaluator(
            replace(self._bundle, wasm=wasm),
            deadline_ms=TEST_TIMEOUT_SECONDS * 1000,
            memory_max_mib=MEMORY_MAX_MIB,
            entrypoints=entrypoints,
        )

    def _ask(self, evaluator: WasmEvaluator, entrypoint: str, test: _Test) -> Ran:
        if self._is_over():
            return _not_run(_NO_TIME)
        value: JsonValue = None
        note = ""
        try:
            value = evaluator.evaluate(entrypoint, {})
        except PolicyError as error:
            notes: dict[str, str] = {
                ReasonCode.POLICY_TIMEOUT: _TOO_LONG,
                ReasonCode.POLICY_ERROR: _ERROR,
            }
            note = notes.get(error.reason_code, "")
        failed = () if note else tuple(sorted(_cases_not_true(value, test.cases)))
        # A test with cases, and with data that makes none of them, is true as {}.
        passed = not failed if test.cases else value is True or value == {}
        return Ran(
            outcome=Outcome.PASSED if passed and not note else Outcome.FAILED,
            failed_cases=failed,
            note=note,
        )


_NO_TIME: Final = "there was no time left for it"


def _cases_not_true(value: JsonValue, cases: Mapping[str, Any]) -> Iterator[str]:
    for name, result in cases.items():
        of_case = value.get(name) if isinstance(value, dict) else None
        below = result.get("sub_results")
        if below:
            yield from (f"{name}/{case}" for case in _cases_not_true(of_case, below))
        elif of_case is not True:
            yield name
