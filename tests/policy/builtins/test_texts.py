"""Strings and sprintf, where OPA's own cases do not look."""

from __future__ import annotations

import pytest

from pdp.policy.builtins import BuiltinError
from tests.policy.builtins.asking import ask


@pytest.mark.parametrize(
    ("layout", "values", "text"),
    (
        ("%d%%", [5], "5%"),
        ("%5.2f|%-6s|%06d|%+d", [3.14159, "ab", -42, 7], " 3.14|ab    |-00042|+7"),
        ("%x %X %#o %b %q %c %U", [255, "hi", 8, 5, "a\n", 65, 233], 'ff 6869 010 101 "a\\n" A U+00E9'),
        ("%v %v %v", [[1, "a"], {"b": None, "a": True}, 1e6], '[1, "a"] {"a": true, "b": null} 1e+06'),
        ("%[2]d %[1]d %[1]*d", [3, 2], "2 3   2"),
        ("%d", ["a"], "%!d(string=a)"),
        ("%d %d", [1], "1 %!d(MISSING)"),
        ("%d", [1, 2], "1%!(EXTRA int64=2)"),
        ("%d", [2**70], "1180591620717411303424"),
        ("%z %!", [1], "%!z(int64=1) %!!(MISSING)"),
    ),
)  # fmt: skip
def test_sprintf_writes_as_go_writes(layout: str, values: list[object], text: str) -> None:
    assert ask("sprintf", layout, values) == text


@pytest.mark.parametrize(
    "layout", ("%9000000d", "%.9000000f", "%d" * 20_000, "%1000000[1]d" * 3, "%x", "%#g")
)
def test_sprintf_refuses_what_the_host_would_pay_for_or_does_not_write(layout: str) -> None:
    with pytest.raises(BuiltinError):
        ask("sprintf", layout, [1.5])


def test_a_width_that_go_does_not_read_ends_the_format() -> None:
    assert ask("sprintf", "%99999999999d", [1]) == "%!(NOVERB)%!(EXTRA int64=1)"


def test_overlapping_occurrences_are_found() -> None:
    assert ask("indexof_n", "aéaéa", "aéa") == [0, 2]


def test_a_search_that_would_take_long_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        ask("indexof_n", "a" * 160_000, "a" * 80_000)


def test_many_prefixes_are_not_compared_with_each_of_many_texts() -> None:
    texts = [f"b{index:05}" for index in range(10_000)]
    assert ask("strings.any_prefix_match", texts, [f"a{text}" for text in texts]) is False
    assert ask("strings.any_prefix_match", texts, ["b0", "b00", "b0001", "c"]) is True
    assert ask("strings.any_suffix_match", ["x/é"], ["é", "ö"]) is True


def test_more_than_a_builtin_takes_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError, match="given more"):
        ask("strings.count", "a" * 1_100_000, "a")
