"""The bundles of bench/grown.py are as large as they say, and their rules are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.grown import (
    NO_RATE,
    READ,
    ROLE,
    SCOPES,
    WRITE,
    blocked_order,
    tenant,
    write_bundle,
)
from pdp.policy.archive import read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer


def test_a_bundle_has_as_many_tenants_and_tools_as_it_was_asked_for(tmp_path: Path) -> None:
    file = write_bundle(tmp_path / "bundle.tar.gz", tenants=30, tools=20, reusable_reads=True)
    data = json.loads(read_archive(file.read_bytes(), place="bundle")["data.json"])
    assert len(data["tenants"]) == 30
    assert len(data["tools"]) == 20
    assert data["tenants"][tenant(29)]["allowlist"] == list(data["tools"])
    assert data["tools"][READ]["permit"]["max_uses"] == 1_000
    assert "max_uses" not in data["tools"][WRITE]["permit"]


@pytest.mark.slow
def test_each_of_the_further_rules_is_asked(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle.tar.gz", rules=40)
    issuer = TokenIssuer()
    token = issuer.token(tenant(0), "alice", roles=[ROLE], scopes=SCOPES)
    with (
        SidecarProcess(
            tmp_path, issuer=issuer, bundle=bundle, config={"limits": NO_RATE}
        ) as sidecar,
        Caller(sidecar.target, token=token) as caller,
    ):
        orders = [blocked_order(number) for number in (0, 39, 40)]
        answers = [caller.authorize(READ, {"order_id": order}).decision for order in orders]
    assert answers == [False, False, True]
