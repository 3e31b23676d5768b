"""Callers who are not known can not have the audit log written full."""

from __future__ import annotations

import pytest

from pdp.errors import PdpError
from pdp.strangers import BURST, PER_SECOND, Strangers


def test_a_flood_is_recorded_up_to_a_bound_and_the_rest_is_counted() -> None:
    now = [0.0]
    strangers = Strangers(clock=lambda: now[0])
    for _ in range(BURST):
        assert strangers.admit() == 0
    for _ in range(7):
        with pytest.raises(PdpError) as caught:
            strangers.admit()
        assert caught.value.reason_code == "rate_limited"
    now[0] += 1 / PER_SECOND
    assert strangers.admit() == 7
    with pytest.raises(PdpError):
        strangers.admit()


def test_quiet_fills_it_up_again_and_no_further() -> None:
    now = [0.0]
    strangers = Strangers(clock=lambda: now[0])
    for _ in range(BURST):
        strangers.admit()
    now[0] += 1_000_000
    for _ in range(BURST):
        assert strangers.admit() == 0
    with pytest.raises(PdpError):
        strangers.admit()
