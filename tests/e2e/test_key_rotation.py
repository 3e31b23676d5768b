"""A rotation of the permit keys, as an operator does it, under a guard that goes on asking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdp.canonical import JsonObject
from pdp.client import Guard
from pdp.permit import PermitError, PermitRedeemer, PermitVerifier
from pdp.testing import SidecarProcess, TokenIssuer
from tests.e2e.operating import command, refused, soon

BUNDLE = Path(__file__).resolve().parents[2] / "policies" / "bundle.tar.gz"
ORDER: JsonObject = {"order_id": "918", "status": "shipped"}


def keys(sidecar: SidecarProcess, *words: str) -> str:
    return command(sidecar, "keys", *words)


def test_keys_rotate_without_a_call_lost_and_old_permits_count_until_retired(
    tmp_path: Path,
) -> None:
    idp = TokenIssuer()
    token = idp.token("tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:write"])
    with (
        SidecarProcess(tmp_path, issuer=idp, bundle=BUNDLE) as sidecar,
        Guard(sidecar.target) as guard,
        guard.acting_for(token),
        PermitRedeemer(sidecar.target) as tool_server,
    ):
        [old] = json.loads(keys(sidecar, "list", "--output", "json"))
        assert old["use"] == "signs"
        before = [guard.authorize("orders.update", ORDER) for _ in range(2)]

        told = keys(sidecar, "rotate", "--overlap-seconds", "1")
        [new, kept] = json.loads(keys(sidecar, "list", "--output", "json"))
        assert kept == {"kid": old["kid"], "use": "verifies"}
        assert f"pdp keys retire {old['kid']}" in told

        def signs_anew() -> bool:
            permit = guard.authorize("orders.update", ORDER)
            verifier = PermitVerifier(tool_server.keys(), issuer="agent-pdp", audience="tools")
            verifier.verify(permit.token, tool="orders.update", arguments=ORDER)
            return (
                tool_server.keys().find(new["kid"]) is not None
                and permit.token.split(".")[0] != before[0].token.split(".")[0]
            )

        assert soon(signs_anew)
        tool_server.redeem(before[0])

        keys(sidecar, "retire", old["kid"])
        assert soon(lambda: tool_server.keys().find(old["kid"]) is None)
        with pytest.raises(PermitError) as caught:
            tool_server.redeem(before[1])
        assert caught.value.reason_code == "permit_invalid"
        tool_server.redeem(guard.authorize("orders.update", ORDER))


def test_a_rotation_that_was_stopped_goes_on_with_the_key_that_is_published(
    tmp_path: Path,
) -> None:
    sidecar = SidecarProcess(tmp_path, issuer=TokenIssuer(), bundle=BUNDLE)
    with sidecar:
        pass
    published = keys(sidecar, "add").strip()
    assert f"{published} signs" in keys(sidecar, "rotate", "--overlap-seconds", "0")
    listed = json.loads(keys(sidecar, "list", "--output", "json"))
    assert listed[0]["kid"] == published
    assert len(listed) == 2


def test_what_can_not_be_done_with_keys_says_what_to_do(tmp_path: Path) -> None:
    file = str(tmp_path / "absent.pem")
    assert "--config or by --file" in refused("keys", "list")
    assert "can not be read: No such file" in refused("keys", "list", "--file", file)
    (tmp_path / "pdp.yaml").write_text("identity: {mode: jwt}\n")
    assert "pdp.yaml" in refused("keys", "rotate", "--config", str(tmp_path / "pdp.yaml"))
