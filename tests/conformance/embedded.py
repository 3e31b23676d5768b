"""Runs OPA's conformance cases in the embedded engine.

Hundreds of cases become one module, each below a place of its own, with a rule that
collects what its query answers. What has been built is kept in .tools/conformance.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

import pytest

from pdp.policy import builtins
from pdp.policy.abi import EPOCHS, Instance, Lend, ModuleError, Program, RunError, deadline_ticks
from pdp.policy.builtins.values import Object, Value, parse, text_of
from tests.conformance.opa_cases import Case
from tests.conformance.relocation import moved

CASES_PER_MODULE: Final = 300
_CACHE: Final = Path(__file__).resolve().parent.parent.parent / ".tools" / "conformance"
_BUILD_SECONDS: Final = 100
_EVALUATION_SECONDS: Final = 5
_MEMORY_BYTES: Final = 512 * 1024 * 1024
_NOW_NS: Final = 1_700_000_000_123_456_789
_UNKNOWN_TO_OPA: Final = frozenset({"test.sleep"})
"""Built-ins of OPA's Go tests that the opa command does not compile."""
_FUNCTION: Final = re.compile(r"g\d+\.data\.(?:query\.)?(c\d+)\.")


class Outcome(StrEnum):
    """What came of a case."""

    PASSED = "passed"
    REFUSED = "refused at load"
    DIFFERS = "differs"


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one case."""

    case: Case
    outcome: Outcome
    lent: frozenset[str]
    """The built-ins that it asks of the host, and that the host has."""
    missing: frozenset[str]
    """Those that the host does not have: for these it is refused."""
    said: str = ""
    """What the engine answered, where that differs."""


def run(cases: Sequence[Case], opa: Path) -> list[Finding]:
    """What comes of each case, in their order."""
    findings: list[Finding] = []
    for start in range(0, len(cases), CASES_PER_MODULE):
        with _Batch(cases[start : start + CASES_PER_MODULE], opa) as batch:
            findings += batch.findings()
    return findings


class _Batch:
    """Cases that share a module."""

    def __init__(self, cases: Sequence[Case], opa: Path) -> None:
        self._cases = cases
        sources = dict(_sources(cases))
        folder = _CACHE / _digest(sources, opa)
        if not folder.is_dir():
            _build(sources, opa, folder)
        self._calls: dict[str, list[str]] = json.loads((folder / "calls.json").read_bytes())
        self._program = _program(folder)
        self._data = json.dumps({_place(case): case.data for case in cases}).encode()
        self._instance = self._loaded()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._instance.close()

    def findings(self) -> Iterator[Finding]:
        """What comes of each case."""
        asked_of_host = frozenset(self._instance.builtins.values())
        for case in self._cases:
            calls = frozenset(self._calls.get(_place(case), ()))
            needs = (calls & asked_of_host) | _needs_unknown(case)
            missing = needs - builtins.NAMES
            said = None if missing else self._difference(case)
            yield Finding(
                case=case,
                outcome=(
                    Outcome.REFUSED
                    if missing
                    else Outcome.PASSED
                    if said is None
                    else Outcome.DIFFERS
                ),
                lent=needs & builtins.NAMES,
                missing=missing,
                said=said or "",
            )

    def _difference(self, case: Case) -> str | None:
        without_answer = case.wanted is None and case.fails_only_when_strict
        wanted = frozenset() if without_answer else case.wanted
        try:
            answers = case.answers(self._rows(case))
            if answers != wanted:
                answers = case.answers(self._rows(case, sets_in_order=True))
        except RunError as error:
            return None if wanted is None else f"fails: {error}"
        return None if answers == wanted else f"answers {sorted(map(text_of, answers))}"

    def _rows(self, case: Case, *, sets_in_order: bool = False) -> Value:
        """What the query of a case answers, as the engine gives it: as JSON. It lists the
        members of a set in any order, so OPA's own tests look at the value before that.
        """
        evaluation = builtins.Evaluation(now_ns=_NOW_NS)
        try:
            with EPOCHS:
                text = (_value_of if sets_in_order else Instance.evaluate)(
                    self._instance,
                    self._instance.entrypoints[_entrypoint(case)],
                    case.document,
                    ticks=deadline_ticks(_EVALUATION_SECONDS),
                    lend=lambda name, arguments: builtins.call(name, arguments, evaluation),
                )
        except RunError:
            self._instance.close()
            self._instance = self._loaded()
            raise
        # Where annotations tell the place of a rule, they tell the one that it was moved to.
        results = parse(re.sub(rf'"{_place(case)}", ?'.encode(), b"", text))
        assert isinstance(results, tuple | frozenset)
        (result,) = results
        assert isinstance(result, Object)
        rows = result["result"]
        return tuple(rows) if isinstance(rows, frozenset) else rows

    def _loaded(self) -> Instance:
        return Instance(self._program, data=self._data, memory_max_bytes=_MEMORY_BYTES)


def _place(case: Case) -> str:
    return f"c{case.number}"


def _entrypoint(case: Case) -> str:
    return f"query/{_place(case)}/answers"


def _needs_unknown(case: Case) -> frozenset[str]:
    return frozenset(
        name for name in _UNKNOWN_TO_OPA if any(f"{name}(" in module for module in case.modules)
    )


def _sources(cases: Sequence[Case]) -> Iterator[tuple[str, str]]:
    for case in cases:
        if _needs_unknown(case):
            continue
        place = _place(case)
        for index, module in enumerate(case.modules):
            yield f"{place}_{index}.rego", moved(module, place)
        bindings = ", ".join(f"{json.dumps(name)}: {name}" for name in case.bindings)
        query = moved(case.query, place)
        rule = f"answers contains {{{bindings}}} if {{\n\t{query}\n}}"
        yield f"{place}_query.rego", f"package query.{place}\n\n{rule}\n"


def _digest(sources: Mapping[str, str], opa: Path) -> str:
    version = subprocess.run([opa, "version"], capture_output=True, check=True).stdout.decode()
    return hashlib.sha256(json.dumps([version, sources]).encode()).hexdigest()


def _build(sources: Mapping[str, str], opa: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
        rego, built = Path(scratch, "rego"), Path(scratch, "built")
        rego.mkdir()
        built.mkdir()
        for name, text in sources.items():
            rego.joinpath(name).write_text(text, encoding="utf-8")
        plan = json.loads(_built(rego, "plan", opa))
        built.joinpath("calls.json").write_text(json.dumps(_calls(plan)), encoding="utf-8")
        built.joinpath("policy.wasm").write_bytes(_built(rego, "wasm", opa))
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run may have been quicker
                raise


def _built(rego: Path, target: str, opa: Path) -> bytes:
    """What ``opa build`` makes of it, in one form or the other."""
    packed = rego.parent / f"{target}.tar.gz"
    command: list[str | Path] = [opa, "build", "--target", target, "--output", packed]
    for query in sorted(rego.glob("*_query.rego")):
        command += ["--entrypoint", f"query/{query.name.removesuffix('_query.rego')}/answers"]
    done = subprocess.run(
        [*command, "."],
        cwd=rego,
        capture_output=True,
        text=True,
        timeout=_BUILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(packed) as archive:
        member = archive.extractfile("/plan.json" if target == "plan" else "/policy.wasm")
        assert member is not None
        return member.read()


def _calls(plan: dict[str, dict[str, list[dict[str, object]]]]) -> dict[str, list[str]]:
    """The built-ins that each place calls, out of OPA's own plan for the module."""
    known = {str(one["name"]) for one in plan["static"]["builtin_funcs"]}
    calls: dict[str, set[str]] = {}
    for function in plan["funcs"]["funcs"]:
        found = _FUNCTION.match(str(function["name"]))
        assert found is not None, function["name"]
        called = re.findall(r'"func": "([^"]+)"', json.dumps(function["blocks"]))
        calls.setdefault(found[1], set()).update(known.intersection(called))
    return {place: sorted(names) for place, names in calls.items()}


def _program(folder: Path) -> Program:
    wasm = folder.joinpath("policy.wasm").read_bytes()
    kept = folder / "policy.code"
    try:
        return Program.from_machine_code(kept.read_bytes(), wasm=wasm)
    except (FileNotFoundError, ModuleError):
        program = Program.compile(wasm)
    scratch = folder / f"policy.code.{os.getpid()}"
    scratch.write_bytes(program.machine_code())
    scratch.rename(kept)
    return program


def _value_of(
    instance: Instance, entrypoint: int, document: bytes, *, ticks: int, lend: Lend
) -> bytes:
    """As Instance.evaluate, but in OPA's text form."""
    call = instance._call

    def call_for_value(name: str, *arguments: int) -> int:
        return call(name, *arguments[:-1], 1) if name == "opa_eval" else call(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instance, "_call", call_for_value)
        return instance.evaluate(entrypoint, document, ticks=ticks, lend=lend)
