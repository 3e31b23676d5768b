"""net.cidr_*, where OPA's own cases do not look."""

from __future__ import annotations

import json

import pytest

from pdp.policy.builtins import BuiltinError, Evaluation, call
from pdp.policy.builtins.values import parse

EVALUATION = Evaluation(now_ns=0)


def answer(name: str, *arguments: object) -> object:
    text = call(name, [json.dumps(argument).encode() for argument in arguments], EVALUATION)
    return None if text is None else parse(text)


@pytest.mark.parametrize(
    ("cidr", "valid"),
    (
        ("10.0.0.0/8", True),
        ("10.0.0.1/08", True),
        ("::ffff:10.0.0.1/100", True),
        ("::/128", True),
        ("10.0.0.0", False),
        ("10.0.0.0/", False),
        ("10.0.0.0/33", False),
        ("10.0.0.0/+8", False),
        ("10.0.0.00/8", False),
        ("fe80::1%eth0/64", False),
        ("1:2:3:4::5:6:7:8/64", False),
        ("\u0661.0.0.0/8", False),
        (7, False),
    ),
)
def test_networks_are_valid_that_go_parses(cidr: object, *, valid: bool) -> None:
    assert answer("net.cidr_is_valid", cidr) is valid


def test_a_network_is_expanded_to_its_addresses() -> None:
    assert answer("net.cidr_expand", "10.0.0.7/31") == {"10.0.0.6", "10.0.0.7"}
    assert answer("net.cidr_expand", "::ffff:10.0.0.7/127") == {"10.0.0.6", "10.0.0.7"}
    assert answer("net.cidr_expand", "2001:db8::/127") == {"2001:db8::", "2001:db8::1"}
    assert answer("net.cidr_expand", "255.255.255.255/32") == {"255.255.255.255"}


def test_a_network_of_too_many_addresses_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        answer("net.cidr_expand", "10.0.0.0/15")


def test_too_many_pairs_of_networks_end_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        answer("net.cidr_contains_matches", ["10.0.0.0/8"] * 300, ["10.0.0.1"] * 300)


def test_networks_of_one_family_hold_none_of_the_other() -> None:
    assert answer("net.cidr_contains_matches", "::/0", ["10.0.0.1", "::1"]) == {
        ("::/0", parse(b"1"))
    }
    assert answer("net.cidr_contains_matches", "0.0.0.0/0", ["::ffff:10.0.0.1", "::1"]) == {
        ("0.0.0.0/0", parse(b"0"))
    }


def test_an_address_is_merged_as_the_network_of_its_class() -> None:
    assert answer("net.cidr_merge", ["10.1.2.3"]) == {"10.1.2.3/8"}
    assert answer("net.cidr_merge", ["172.16.0.1", "192.168.1.1"]) == {
        "172.16.0.1/16",
        "192.168.1.1/24",
    }


def test_what_opa_merges_wrong_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        answer("net.cidr_merge", ["::ffff:10.0.0.0/104", "10.0.0.0/8"])
    with pytest.raises(BuiltinError):
        answer("net.cidr_merge", ["64:ff9b::/97", "64:ff9b::8000:0/97"])


def test_adjoining_networks_become_as_few_as_can_be() -> None:
    assert answer("net.cidr_merge", ["10.0.0.0/25", "10.0.0.128/25", "10.0.1.0/24"]) == {
        "10.0.0.0/23"
    }
    assert answer("net.cidr_merge", ["2001:db8::/33", "2001:db8:8000::/33"]) == {"2001:db8::/32"}
