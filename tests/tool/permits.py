"""Permits for tests of tool servers, and a redeemer that counts."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from pdp.canonical import JsonObject, sha256_hex
from pdp.permit import Permit, PermitError, PermitRedeemer, PermitVerifier
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey

KEY = SigningKey.generate()
ORDER: JsonObject = {"order_id": "918", "status": "shipped"}
_numbers = itertools.count()


def permit(
    tool: str = "orders.update", arguments: JsonObject | None = None, **changes: object
) -> Permit:
    """A signed permit of tenant_acme."""
    number = next(_numbers)
    now = int(time.time())
    plain = Permit(
        id=f"permit-{number}",
        issuer="agent-pdp",
        audience="orders",
        tenant="tenant_acme",
        actor="user-7",
        tool=tool,
        arguments_sha256=sha256_hex(ORDER if arguments is None else arguments),
        scopes=("orders:write",),
        transaction=f"request-{number}",
        decision_id=f"decision-{number}",
        policy_revision="1",
        ledger="ledger",
        issued_at=now,
        expires_at=now + 60,
    )
    changed = replace(plain, **changes)  # type: ignore[arg-type]
    return PermitIssuer(KEY, issuer="agent-pdp").sign(changed)


def verifier() -> PermitVerifier:
    return PermitVerifier(KEY.public_set, issuer="agent-pdp", audience="orders")


class Register(PermitRedeemer):
    """Redeems as a sidecar does, in this process."""

    def __init__(self) -> None:
        super().__init__("unix:///nowhere")
        self.used: list[str] = []

    def redeem(self, permit: Permit) -> None:
        if self.used.count(permit.id) == permit.max_uses:
            raise PermitError("permit_used", "The permit is used.")
        self.used.append(permit.id)
