"""JSON is read alike everywhere, or refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from pdp.canonical import (
    MAX_SAFE_INTEGER,
    JsonError,
    canonical_bytes,
    check,
    parse,
    parse_object,
    sha256_hex,
)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("data", "problem"),
    (
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"a":1,"a":1}', "duplicate key"),
        (b'{"a":{"b":1,"b":2}}', "duplicate key"),
        (b"NaN", "NaN or Infinity"),
        (b"[-Infinity]", "NaN or Infinity"),
        (b"1e400", "NaN or Infinity"),
        (str(2**60).encode(), "beyond"),
        (str(2**53).encode(), "beyond"),
        (b"1" * 5000, "beyond"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\udc00":1}', "lone surrogate"),
        (b"[" * 1000 + b"]" * 1000, "nested more than 64"),
        (b"[" * 200_000 + b"]" * 200_000, "nested more than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64"),
    ),
)
def test_what_two_parsers_could_read_differently_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(JsonError, match=problem):
        parse(data, max_bytes=1_000_000)


def test_size_is_bounded_before_anything_is_read() -> None:
    with pytest.raises(JsonError, match="11 bytes long; at most 10"):
        parse(b'"123456789"', max_bytes=10)


@pytest.mark.parametrize("data", (b"[]", b"1", b'"a"', b"null"))
def test_an_object_is_an_object(data: bytes) -> None:
    with pytest.raises(JsonError, match="must be a JSON object"):
        parse_object(data, max_bytes=100)


@pytest.mark.parametrize(
    "value",
    ((1,), {1: 2}, {"a": {3}}, b"x", object(), float("nan"), float("inf"), 2**53, "\ud800"),
)
def test_values_that_are_not_plain_json_are_refused(value: object) -> None:
    with pytest.raises(JsonError):
        check(value)


def test_sixty_four_levels_are_read() -> None:
    check(parse(b"[" * 64 + b"]" * 64, max_bytes=1000))


@given(JSON_VALUES)
def test_the_digest_does_not_depend_on_how_the_json_was_written(value: object) -> None:
    plain = parse(json.dumps(value).encode(), max_bytes=1_000_000)
    spaced = parse(json.dumps(value, indent=3, ensure_ascii=False).encode(), max_bytes=1_000_000)
    assert sha256_hex(plain) == sha256_hex(spaced)


@given(JSON_VALUES)
def test_the_bytes_are_those_of_the_reference_library(value: Any) -> None:
    assert canonical_bytes(value) == rfc8785.dumps(value)


def test_the_digest_is_that_of_rfc_8785() -> None:
    # From RFC 8785 3.2.3: members sorted by UTF-16 code units, numbers shortest.
    value = parse(b'{"\\u20ac":"x","\\r":1.50,"1":1e2,"b":{"c":-0.0}}', max_bytes=1000)
    canonical = b'{"\\r":1.5,"1":100,"b":{"c":0},"\xe2\x82\xac":"x"}'
    assert sha256_hex(value) == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize("value", (2**53, -(2**53), b"x", {"a": {1}}, "\ud800", [float("nan")]))
def test_what_is_not_json_of_the_agreed_form_has_no_canonical_bytes(value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of either encoder
        canonical_bytes(value)
