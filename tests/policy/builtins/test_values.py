"""The text that the host and a module exchange."""

from __future__ import annotations

import pytest

from pdp.policy.builtins.faults import BuiltinError
from pdp.policy.builtins.values import Number, Object, dump, in_order, parse


@pytest.mark.parametrize(
    "text",
    (
        "null",
        "true",
        "-12.50e+3",
        "0.5",
        "123456789012345678901234567890",
        '"a\\"\\\\\\n\\u0000\u00e9\U0001f600"',
        "[]",
        "[1, [2]]",
        "{}",
        "set()",
        "{1}",
        '{1, "a", [2]}',
        '{1: {2: 3}, "a": null, [2]: set(), {3}: {}}',
    ),
)
def test_what_is_read_is_written_the_same(text: str) -> None:
    assert dump(parse(text.encode())) == text.encode()


@pytest.mark.parametrize(
    "text", ("", "nul", "[1", "[1 2]", "{1: 2, 3}", '"a', "1 1", "set(", "{1:")
)
def test_text_that_is_no_value_is_a_fault(text: str) -> None:
    with pytest.raises(BuiltinError):
        parse(text.encode())


def test_bytes_that_are_no_utf8_are_a_fault() -> None:
    with pytest.raises(BuiltinError):
        parse(b'"\xff"')
    with pytest.raises(BuiltinError):
        dump("\udcff")


def test_numbers_are_equal_by_value_and_no_booleans() -> None:
    assert Number("1.0") == Number("1")
    assert len({Number("1.0"), Number("1"), True}) == 2
    assert Number("10000000000000001") != Number("10000000000000000")


def test_values_of_all_kinds_have_the_order_of_opa() -> None:
    ordered = (None, False, True, Number("-1"), Number("2"), "a", (Number("9"),),
               Object([("a", None)]), frozenset({"a"}))  # fmt: skip
    assert in_order(reversed(ordered)) == list(ordered)


def test_giant_numbers_are_a_fault() -> None:
    with pytest.raises(BuiltinError):
        Number("1e100000").integer()
    with pytest.raises(BuiltinError):
        Number("1e99999999999999999999")


def test_a_number_that_begins_with_its_point_is_read() -> None:
    assert dump(parse(b"[.5, -.5]")) == b"[0.5, -0.5]"
