"""regex.*, where OPA's own cases do not look."""

from __future__ import annotations

import pytest

from pdp.policy.builtins import BuiltinError
from tests.policy.builtins.asking import ask


@pytest.mark.parametrize(
    ("text", "pattern", "template", "replaced"),
    (
        ("aéb", "", "-", "-a-é-b-"),
        ("aab", "a*", "<$0>", "<aa>b<>"),
        ("ab", "(?P<x>a)(b)", "$x$2$$ $2x${2}x", "ab$ bx"),
        ("a", "(a)", "$01$9", ""),
        ("aÄ", "(?i)ä", "x", "ax"),
    ),
)
def test_matches_are_replaced_as_go_does(
    text: str, pattern: str, template: str, replaced: str
) -> None:
    assert ask("regex.replace", text, pattern, template) == replaced


@pytest.mark.parametrize("pattern", ("(", r"\C", "(?=a)", r"(a)\1", "a{1001}"))
def test_what_go_does_not_take_for_a_pattern_is_undefined(pattern: str) -> None:
    assert ask("regex.split", pattern, "a") is None


@pytest.mark.parametrize(
    "pattern", ("x" * 5_000, "((a?b?c?){30}){30}", "a.*z|a"), ids=["long", "huge", "quadratic"]
)
def test_a_search_that_would_take_long_ends_the_evaluation(pattern: str) -> None:
    with pytest.raises(BuiltinError):
        ask("regex.find_n", pattern, "a" * 100_000, -1)


def test_a_replacement_that_grows_without_limit_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        ask("regex.replace", "a" * 2_000, "a", "b" * 10_000)


def test_only_what_stands_between_the_delimiters_is_a_pattern() -> None:
    assert ask("regex.template_match", "urn:<.*>.x", "urn:abc.x", "<", ">") is True
    assert ask("regex.template_match", "urn:<.*>.x", "urn:abcyx", "<", ">") is False
    assert ask("regex.template_match", "a<)(>b", "ab", "<", ">") is None
