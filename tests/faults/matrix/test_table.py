"""The matrix is whole."""

from __future__ import annotations

from collections import Counter

from tests.faults.matrix.page import PAGE, page, read_times, recovering
from tests.faults.matrix.table import OMISSIONS, ROWS, Dependency, Failure


def test_every_failure_of_every_dependency_is_a_row_or_says_why_not() -> None:
    pairs = Counter((row.dependency, row.failure) for row in ROWS)
    pairs += Counter((omission.dependency, omission.failure) for omission in OMISSIONS)
    assert pairs == Counter((one, other) for one in Dependency for other in Failure)


def test_what_is_left_out_says_why() -> None:
    assert all(omission.why for omission in OMISSIONS)


def test_every_row_has_passed_and_its_recovery_was_timed() -> None:
    assert read_times().keys() == recovering()


def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_times()), "run make reliability"
