"""What mutation testing has found stands on its page, and each of it is explained."""

from __future__ import annotations

from pathlib import Path

from scripts import mutants

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_that_went_unnoticed_is_left_unexplained() -> None:
    _, left, of_nothing = mutants.page()
    assert left == []
    assert of_nothing == []


def test_the_page_is_what_was_found() -> None:
    text, _, _ = mutants.page()
    assert mutants.PAGE.read_text(encoding="utf-8") == text


def test_every_module_and_test_that_is_named_exists() -> None:
    for group in mutants.GROUPS.values():
        for name in (*group["mutate"], *group["tests"]):
            assert (ROOT / name).exists(), name


def test_words_are_told_from_what_counts() -> None:
    refusal = 'raise PermitError(ReasonCode.PERMIT_USED, "The permit is used.")'
    mutant = mutants.Mutant("m", "f", refusal, refusal.replace("used.", "USED."), "survived")
    assert any(each.explains(mutant) for each in mutants.explanations())
    for after in (
        refusal.replace("PERMIT_USED", "PERMIT_EXPIRED"),
        refusal.replace("raise", "return"),
        refusal.replace("PermitError", "ValueError"),
    ):
        other = mutants.Mutant("m", "f", refusal, after, "survived")
        assert not any(each.explains(other) for each in mutants.explanations())
