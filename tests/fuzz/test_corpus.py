"""Whatever a fuzzer has kept, or found once, holds to the contract of its target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import contract
from tests.fuzz.in_process import close_sidecar


@pytest.fixture(scope="module", autouse=True)
def closes_what_it_starts() -> Iterator[None]:
    yield
    close_sidecar()


@pytest.mark.parametrize("name", contract.names())
def test_inputs_that_reach_far_or_broke_something_once_are_harmless(name: str) -> None:
    target = contract.load(name)
    for folder in (contract.CORPUS / name, contract.FOUND / name):
        for path in sorted(folder.glob("*")):
            try:
                contract.run(target, path.read_bytes())
            except Exception as error:
                error.add_note(f"with {path}")
                raise


@pytest.mark.parametrize("name", contract.names())
def test_a_fuzzer_begins_with_what_is_taken(name: str) -> None:
    target = contract.load(name)
    for sample in target.samples():
        assert contract.run(target, sample), sample
