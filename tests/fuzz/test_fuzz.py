"""A while of fuzzing in every run of CI; `make fuzz` goes on for longer."""

from __future__ import annotations

import pytest

from tests.fuzz import run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_while_of_fuzzing_breaks_nothing() -> None:
    assert run.main(["--seconds", "3"]) == 0
