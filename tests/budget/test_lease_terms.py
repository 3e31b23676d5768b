"""How a configuration becomes the terms of leases."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdp.budget.bounds import MAX_HOLD_SECONDS
from pdp.budget.lease_pool import MARGIN_SECONDS, LeaseTerms
from pdp.config import Budget, Lease, RedisSettings


def test_leases_need_a_shared_store() -> None:
    with pytest.raises(ValueError, match="lease needs a shared store"):
        Budget(lease=Lease())
    assert Budget(store=RedisSettings(unix=Path("/run/redis.sock")), lease=Lease()).lease


def test_a_lease_is_held_for_as_long_as_there_may_be_holds_under_it() -> None:
    terms = LeaseTerms.of(Lease(seconds=30), hold_ttl_seconds=120)
    assert terms.ttl_seconds == 30 + 120 + MARGIN_SECONDS


def test_a_lease_is_never_held_for_longer_than_a_hold_can_live() -> None:
    terms = LeaseTerms.of(Lease(seconds=600), hold_ttl_seconds=MAX_HOLD_SECONDS)
    assert terms.ttl_seconds == MAX_HOLD_SECONDS
    assert terms.longest_hold_seconds == MAX_HOLD_SECONDS - 600 - MARGIN_SECONDS
