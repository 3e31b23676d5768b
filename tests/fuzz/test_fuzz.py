"""A while of fuzzing in every run of CI; `make fuzz` goes on for longer."""

from __future__ import annotations

import pytest

from tests.fuzz import run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_while_of_fuzzing_breaks_nothing() -> None:
    # With what it takes to start each target, about twice as long.
    assert run.main(["--seconds", "30", "--shared"]) == 0
