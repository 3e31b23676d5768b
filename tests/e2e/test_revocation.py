"""Who is revoked, as an operator does it, is refused at once at every sidecar on the store."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pdp.client import Guard, PermitDenied
from pdp.permit import PermitError, PermitRedeemer
from pdp.permit.ring import LiveKeys
from pdp.testing import SidecarProcess, TokenIssuer
from tests.budget.redis_server import RedisServer
from tests.e2e.operating import command, records, soon

BUNDLE = Path(__file__).resolve().parents[2] / "policies" / "bundle.tar.gz"
ORDER = {"order_id": "918", "status": "shipped"}
IDP = TokenIssuer()


def token(tenant: str = "tenant_acme", actor: str = "user-7", **claims: Any) -> str:
    return IDP.token(tenant, actor, roles=["support_agent"], scopes=["orders:write"], **claims)


def revoke(sidecar: SidecarProcess, *words: str, code: int = 0) -> str:
    return command(sidecar, "revoke", *words, code=code)


def refusal(guard: Guard, bearer: str) -> str:
    """Why the call is refused; "" where it is allowed."""
    try:
        with guard.acting_for(bearer):
            guard.authorize("orders.update", ORDER)
    except PermitDenied as denied:
        return denied.reason_code
    return ""


def is_revoked(guard: Guard, bearer: str) -> bool:
    return refusal(guard, bearer) == "actor_revoked"


def test_a_revoked_actor_is_refused_with_tokens_and_permits_of_before(tmp_path: Path) -> None:
    alice, bob, stranger = token(), token(actor="user-8"), token("tenant_globex")
    with (
        SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE) as sidecar,
        Guard(sidecar.target) as guard,
        PermitRedeemer(sidecar.target) as tool_server,
    ):
        with guard.acting_for(alice):
            permit = guard.authorize("orders.update", ORDER)
        told = revoke(sidecar, "actor", "tenant_acme", "user-7", "--reason", "left", "--by", "eve")
        assert "the sidecar of this state directory" in told
        assert soon(lambda: refusal(guard, alice) == "actor_revoked")
        assert refusal(guard, bob) == refusal(guard, stranger) == ""
        with pytest.raises(PermitError) as caught:
            tool_server.redeem(permit)
        assert caught.value.reason_code == "permit_revoked"

        revoke(sidecar, "tenant", "tenant_acme", "--reason", "unpaid")
        assert soon(lambda: refusal(guard, bob) == "tenant_suspended")
        assert refusal(guard, stranger) == ""
        revoke(sidecar, "lift", "tenant_acme")
        revoke(sidecar, "lift", "tenant_acme", "--actor", "user-7")
        assert soon(lambda: refusal(guard, alice) == "")
        revoke(sidecar, "lift", "tenant_acme", code=1)
        revoke(sidecar, "lift", code=2)

        on_record = [each for each in records(sidecar) if each["type"] == "revocation"]
        assert [(each["action"], each["outcome"]) for each in on_record] == [
            ("revoke.actor", "activated"),
            ("revoke.tenant", "activated"),
            ("revoke.tenant", "released"),
            ("revoke.actor", "released"),
        ]
        assert on_record[0]["actor_id"] == "user-7"
        assert on_record[0]["detail"]["by"] == "eve"


def test_one_token_can_be_revoked(tmp_path: Path) -> None:
    lost, other = token(jti="lost"), token(jti="other")
    with (
        SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE) as sidecar,
        Guard(sidecar.target) as guard,
    ):
        assert refusal(guard, lost) == ""
        revoke(sidecar, "token", "tenant_acme", "lost", "--reason", "laptop stolen")
        assert soon(lambda: refusal(guard, lost) == "token_revoked")
        assert refusal(guard, other) == ""


def test_a_revocation_outlives_a_restart_and_a_broken_file_stops_the_start(tmp_path: Path) -> None:
    sidecar = SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE)
    with sidecar:
        revoke(sidecar, "actor", "tenant_acme", "user-7", "--reason", "left", "--hours", "1")
        listed = json.loads(revoke(sidecar, "list", "--output", "json"))["revocations"]
        assert [each["name"] for each in listed] == ["user-7"]
        assert "user-7" in revoke(sidecar, "list")
        sidecar.terminate()
        with sidecar, Guard(sidecar.target) as guard:
            assert refusal(guard, token()) == "actor_revoked"
        (sidecar.state / "revocations.json").write_text("{}")
        with pytest.raises(RuntimeError, match=r"revocations\.json needs a list"):
            sidecar.start()


def test_every_sidecar_on_a_shared_store_goes_by_it_within_a_second(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis").start()
    key = tmp_path / "permit-key.pem"
    LiveKeys(key, make=True)
    directories = tmp_path / "one", tmp_path / "two"
    for directory in directories:
        directory.mkdir()
    one, two = (
        SidecarProcess(
            directory,
            issuer=IDP,
            bundle=BUNDLE,
            config={
                "permit": {"key_file": str(key)},
                "budget": {"store": {"unix": str(server.socket), "timeout_ms": 5000}},
            },
        )
        for directory in directories
    )
    try:
        with one, two, Guard(one.target) as first, Guard(two.target) as second:
            alice = token()
            assert refusal(first, alice) == refusal(second, alice) == ""
            told = revoke(one, "actor", "tenant_acme", "user-7", "--reason", "left")
            assert "every sidecar on this store" in told
            for guard in (first, second):
                assert soon(partial(is_revoked, guard, alice))
    finally:
        server.stop()


def test_what_can_not_be_revoked_is_refused(tmp_path: Path) -> None:
    sidecar = SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE)
    with sidecar:
        revoke(sidecar, "tenant", "no/tenant", "--reason", "x", code=2)
        revoke(sidecar, "actor", "tenant_acme", "a\nb", "--reason", "x", code=2)
        revoke(sidecar, "tenant", "tenant_acme", "--reason", "", code=2)
        assert json.loads(revoke(sidecar, "list", "--output", "json")) == {"revocations": []}
