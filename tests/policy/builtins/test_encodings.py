"""Encodings, numbers and objects, where OPA's own cases do not look."""

from __future__ import annotations

import pytest

from pdp.policy.builtins import BuiltinError, Evaluation, call
from tests.policy.builtins.asking import ask


def test_what_is_no_unicode_when_decoded_ends_the_evaluation() -> None:
    for name, text in (("hex.decode", "ff"), ("urlquery.decode", "%ff")):
        with pytest.raises(BuiltinError):
            ask(name, text)


@pytest.mark.parametrize("text", ("4", "4g", " 41", "41 "))
def test_what_is_no_hex_is_undefined(text: str) -> None:
    assert ask("hex.decode", text) is None


def test_json_is_written_as_go_writes_it() -> None:
    value = {"b": [], "a": "<\u2028>", "c": {"d": 1.50}}
    assert ask("json.marshal_with_options", value, {}) == (
        '{"a":"\\u003c\\u2028\\u003e","b":[],"c":{"d":1.5}}'
    )
    assert ask("json.marshal_with_options", value, {"indent": " ", "prefix": ">"}) == (
        '>{\n> "a": "\\u003c\\u2028\\u003e",\n> "b": [],\n> "c": {\n>  "d": 1.5\n> }\n>}'
    )
    assert ask("json.marshal_with_options", value, {"pretty": "yes"}) is None
    assert ask("json.marshal_with_options", value, {"ident": " "}) is None


def test_an_indentation_that_grows_without_limit_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        ask("json.marshal_with_options", [[0] * 1_000], {"indent": " " * 100_000})


def test_a_query_is_read_as_go_reads_it() -> None:
    assert ask("urlquery.decode_object", "a=1&b&a=%C3%A9+x&&=") == {
        "a": ["1", "é x"],
        "b": [""],
        "": [""],
    }
    assert ask("urlquery.decode_object", "a;b") is None
    assert ask("urlquery.decode_object", "a=%zz") is None
    assert ask("urlquery.decode_object", "&" * 10_000) is None


@pytest.mark.parametrize(
    ("text", "amount"),
    (("1Ki", 1024), ("1.5M", 1_500_000), ("3m", 0.003), ("1e3", 1000), ("-2g", -2e9)),
)
def test_units_have_their_case(text: str, amount: float) -> None:
    assert ask("units.parse", text) == amount


def test_bytes_are_whole() -> None:
    assert ask("units.parse_bytes", "1.5KiB") == 1536
    assert ask("units.parse_bytes", "0.3") == 0
    assert ask("units.parse_bytes", "1 kb") is None


def test_giant_amounts_and_ranges_end_the_evaluation() -> None:
    for name, arguments in (
        ("units.parse", ["1e999999"]),
        ("units.parse_bytes", ["1e999999"]),
        ("numbers.range_step", [0, 10**9, 1]),
    ):
        with pytest.raises(BuiltinError):
            ask(name, *arguments)


def test_a_graph_with_too_many_paths_ends_the_evaluation() -> None:
    graph = {str(one): [str(other) for other in range(12)] for one in range(12)}
    with pytest.raises(BuiltinError):
        ask("graph.reachable_paths", graph, ["0"])


def test_a_subset_is_found_within_long_arrays() -> None:
    assert ask("object.subset", [1] * 40_000 + [2], [1] * 20_000 + [2]) is True
    assert ask("object.subset", [1] * 40_000, [1] * 20_000 + [2]) is False


def test_an_array_that_holds_something_twice_counts_it_twice_as_in_opa() -> None:
    assert call("object.subset", [b"[1, 1]", b"{1, 2}"], Evaluation(now_ns=0)) == b"true"
