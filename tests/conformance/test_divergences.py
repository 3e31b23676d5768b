"""That the embedded engine differs from OPA where docs/engines.md says so, and how."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdp.policy.abi import EPOCHS, Instance, Program, RunError, deadline_ticks
from pdp.policy.builtins.values import Object, parse, text_of
from pdp.policy.compile import compile_rego
from tests.conformance.report import FAILS, OPA, UNDEFINED, Divergence, read_divergences

DIVERGENCES = read_divergences()
DEADLINE_SECONDS = 0.1
MEMORY_BYTES = 64 * 1024 * 1024
REGO = "package p\n\n" + "".join(
    f"r{index} := x if {{\n\tx := {divergence.expression}\n}}\n\n"
    for index, divergence in enumerate(DIVERGENCES)
)


@pytest.fixture(scope="module")
def program() -> Program:
    entrypoints = [f"p/r{index}" for index in range(len(DIVERGENCES))]
    return Program.compile(compile_rego({"p.rego": REGO}, b"{}", opa=OPA, entrypoints=entrypoints))


@pytest.fixture
def instance(program: Program) -> Iterator[Instance]:
    one = Instance(program, data=b"{}", memory_max_bytes=MEMORY_BYTES)
    yield one
    one.close()


@pytest.fixture(scope="module")
def from_opa(tmp_path_factory: pytest.TempPathFactory) -> Object:
    file: Path = tmp_path_factory.mktemp("rego") / "p.rego"
    file.write_text(REGO, encoding="utf-8")
    done = subprocess.run(
        [OPA, "eval", "--data", file, "--format", "raw", "data.p"], capture_output=True, check=True
    )
    answers = parse(done.stdout)
    assert isinstance(answers, Object)
    return answers


@pytest.mark.parametrize(
    ("index", "divergence"), tuple(enumerate(DIVERGENCES)), ids=[d.expression for d in DIVERGENCES]
)
def test_a_divergence_is_as_it_is_written_down(
    index: int, divergence: Divergence, instance: Instance, from_opa: Object
) -> None:
    rule = f"r{index}"
    said_by_opa = text_of(from_opa[rule]) if rule in from_opa else UNDEFINED
    assert (_embedded(instance, rule), said_by_opa) == (divergence.embedded, divergence.opa)


def _embedded(instance: Instance, rule: str) -> str:
    try:
        with EPOCHS:
            text = instance.evaluate(
                instance.entrypoints[f"p/{rule}"], b"", ticks=deadline_ticks(DEADLINE_SECONDS)
            )
    except RunError:
        return FAILS
    results = parse(text)
    assert isinstance(results, tuple)
    if not results:
        return UNDEFINED
    (result,) = results
    assert isinstance(result, Object)
    return text_of(result["result"])
