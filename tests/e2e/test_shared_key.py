"""Sidecars that share a signing key do not share what is used up at each."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdp.client import Guard
from pdp.permit import PermitError, PermitRedeemer
from pdp.permit.ring import LiveKeys
from pdp.testing import SidecarProcess, TokenIssuer

BUNDLE = Path(__file__).resolve().parents[2] / "policies" / "bundle.tar.gz"


def test_a_permit_is_redeemed_only_where_it_was_issued(tmp_path: Path) -> None:
    idp = TokenIssuer()
    key = tmp_path / "shared.pem"
    LiveKeys(key, make=True)
    directories = tmp_path / "one", tmp_path / "two"
    for directory in directories:
        directory.mkdir()
    one, two = (
        SidecarProcess(
            directory, issuer=idp, bundle=BUNDLE, config={"permit": {"key_file": str(key)}}
        )
        for directory in directories
    )
    token = idp.token("tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:write"])
    with one, two, Guard(one.target) as guard, guard.acting_for(token):
        permit = guard.authorize("orders.update", {"order_id": "918", "status": "shipped"})
        with PermitRedeemer(two.target) as elsewhere:
            elsewhere.keys()
            with pytest.raises(PermitError) as caught:
                elsewhere.redeem(permit)
        assert caught.value.reason_code == "permit_mismatch"
        with PermitRedeemer(one.target) as at_home:
            at_home.redeem(permit)


def test_a_key_file_that_is_configured_must_be_there(tmp_path: Path) -> None:
    sidecar = SidecarProcess(
        tmp_path,
        issuer=TokenIssuer(),
        bundle=BUNDLE,
        config={"permit": {"key_file": str(tmp_path / "absent.pem")}},
    )
    with pytest.raises(RuntimeError, match=r"permit\.key_file: there is no file .*absent\.pem"):
        sidecar.start()
    sidecar.close()
