"""What the engine is promised of every built-in."""

from __future__ import annotations

import pytest

from pdp.policy.builtins import NAMES, BuiltinError, Evaluation, call

EVALUATION = Evaluation(now_ns=1_700_000_000_123_456_789)


def test_now_is_the_same_throughout_an_evaluation() -> None:
    assert call("time.now_ns", [], EVALUATION) == b"1700000000123456789"


def test_a_builtin_that_is_not_lent_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError, match="not lent"):
        call("http.send", [b"{}"], EVALUATION)


def test_an_operand_of_the_wrong_kind_is_undefined() -> None:
    assert call("semver.compare", [b"1", b'"1.0.0"'], EVALUATION) is None


@pytest.mark.parametrize(
    "family", ("http.", "io.jwt.", "crypto.", "graphql.", "rego.", "rand.", "opa.", "providers.")
)
def test_what_asks_the_world_or_touches_keys_is_never_lent(family: str) -> None:
    assert not [name for name in NAMES if name.startswith(family)]


@pytest.mark.parametrize("name", ("net.lookup_ip_addr", "uuid.rfc4122", "trace"))
def test_what_answers_anew_each_time_is_never_lent(name: str) -> None:
    assert name not in NAMES


def test_a_value_that_is_nested_too_deep_ends_the_evaluation() -> None:
    deep = b"[" * 5_000 + b"]" * 5_000
    with pytest.raises(BuiltinError):
        call("semver.is_valid", [deep], EVALUATION)
