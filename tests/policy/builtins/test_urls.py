"""uri.*, where OPA's own cases do not look."""

from __future__ import annotations

import pytest

from tests.policy.builtins.asking import ask


def test_an_address_is_taken_apart() -> None:
    assert ask("uri.parse", "HTTPS://u:p@[fe80::1%25eth0]:8443/a%2Fb/%C3%A9?q=%20#f%20g") == {
        "scheme": "https",
        "hostname": "fe80::1%eth0",
        "port": "8443",
        "path": "/a/b/é",
        "raw_path": "/a%2Fb/%C3%A9",
        "raw_query": "q=%20",
        "fragment": "f g",
    }
    assert ask("uri.parse", "mailto:a@b") == {"scheme": "mailto"}
    assert ask("uri.parse", "//h/a%20b") == {"hostname": "h", "path": "/a b", "raw_path": "/a b"}


@pytest.mark.parametrize(
    "address",
    (
        "http://%41.com",
        "http://a b/",
        "http://h:x/",
        "http://h:1:2/",
        "http://[1.2.3.4]/",
        "http://[::1/",
        "http://x[::1]/",
        "p:q/r s:t\n",
        "a/../:b%",
        "1a:b",
        ":a",
    ),
)
def test_what_go_does_not_take_for_an_address_is_none(address: str) -> None:
    assert ask("uri.parse", address) is None
    assert ask("uri.is_valid", address) is False


def test_nothing_is_no_address_though_it_can_be_parsed() -> None:
    assert ask("uri.is_valid", "") is False
    assert ask("uri.parse", "") == {}
