"""What a permit says, and its claims on the wire.

Names follow RFC 7519 (registered claims), RFC 9396 (authorization_details), RFC 8693
(act), RFC 8705 (cnf) and the OAuth transaction-token draft (txn, tctx, req_wl).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from pdp.canonical import JsonObject, JsonValue
from pdp.errors import PdpError
from pdp.reason import ReasonCode

DETAIL_TYPE: Final = "tool_call"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CLAIMS: Final = frozenset(
    [
        "iss",
        "aud",
        "iat",
        "nbf",
        "exp",
        "jti",
        "txn",
        "sub",
        "scope",
        "authorization_details",
        "tctx",
    ]
)
_OPTIONAL_CLAIMS: Final = frozenset({"act", "cnf", "req_wl"})
_DETAIL: Final = frozenset(["type", "locations", "actions"])
_OPTIONAL_DETAIL: Final = frozenset({"args_sha256", "identifier", "max_uses"})
_TENANT_CONTEXT: Final = frozenset({"tenant", "decision_id", "policy_revision", "ledger"})
_OPTIONAL_TENANT_CONTEXT: Final = frozenset({"hold_id", "delegations"})
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{43}")
MAX_USES: Final = 1_000
"""Most uses of one permit."""
MAX_AGENTS: Final = 16
"""Most agents that act one for another."""
MAX_DELEGATIONS: Final = MAX_AGENTS + 1
"""One for each agent, and the token that they began with."""


class PermitError(PdpError):
    """A permit was refused.

    Reason codes: permit_missing, permit_invalid, permit_expired, permit_used,
    permit_mismatch, permit_unavailable, outcome_already_reported.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """Leave to call one tool for one tenant: with one set of arguments, once, unless the
    policy has said otherwise.
    """

    id: str
    """The jti."""
    issuer: str
    audience: str
    """The tool server that is to accept it."""
    tenant: str
    actor: str
    tool: str
    arguments_sha256: str
    """SHA-256 over the RFC 8785 form of the arguments, in hexadecimal; empty where the
    permit is for the tool with any arguments."""
    scopes: tuple[str, ...]
    """The scopes under which the tool is to run."""
    transaction: str
    """The request id: an idempotency key that the tool can pass on."""
    decision_id: str
    policy_revision: str
    ledger: str
    """Where its use is counted and its hold lies: only the sidecar with that ledger
    redeems it and takes in its outcome, also where several share a signing key."""
    issued_at: int
    """Unix seconds, as is expires_at."""
    expires_at: int
    hold_id: str = ""
    """What is held for the call; empty when nothing is."""
    resource: str = ""
    """What the call is done to, as type/id; empty if the question did not say, and where
    arguments_sha256 is."""
    max_uses: int = 1
    """How often it can be redeemed; once, where it is for one set of arguments."""
    agents: tuple[str, ...] = ()
    """Who acts for the actor, the one that was delegated to first is first."""
    delegations: tuple[str, ...] = ()
    """Where agents act: the ids of the user's token and of the delegations under which they
    do. When one of them is revoked, the permit can not be redeemed any more."""
    workload: str = ""
    """The workload that asked, as Subject.workload; empty where none showed who it is."""
    certificate_sha256: str = ""
    """The client certificate with which it must be shown: SHA-256 of its DER form, in
    base64url; empty where it can be shown by anybody who has it."""
    token: str = field(default="", repr=False, compare=False)
    """The signed permit itself. A secret."""

    @property
    def namespace(self) -> str:
        """Prefix for this tenant's memory and cache keys."""
        return f"tenant/{self.tenant}/"

    def to_claims(self) -> JsonObject:
        """The payload that is signed."""
        detail: JsonObject = {
            "type": DETAIL_TYPE,
            "locations": [self.audience],
            "actions": [self.tool],
        }
        context: JsonObject = {
            "tenant": self.tenant,
            "decision_id": self.decision_id,
            "policy_revision": self.policy_revision,
            "ledger": self.ledger,
        }
        if self.arguments_sha256:
            detail["args_sha256"] = self.arguments_sha256
        if self.resource:
            detail["identifier"] = self.resource
        if self.max_uses != 1:
            detail["max_uses"] = self.max_uses
        if self.hold_id:
            context["hold_id"] = self.hold_id
        if self.delegations:
            context["delegations"] = list(self.delegations)
        claims: JsonObject = {
            "iss": self.issuer,
            "aud": self.audience,
            "iat": self.issued_at,
            "nbf": self.issued_at,
            "exp": self.expires_at,
            "jti": self.id,
            "txn": self.transaction,
            "sub": self.actor,
            "scope": " ".join(self.scopes),
            "authorization_details": [detail],
            "tctx": context,
        }
        if self.agents:
            claims["act"] = _act(self.agents)
        if self.workload:
            claims["req_wl"] = self.workload
        if self.certificate_sha256:
            claims["cnf"] = {"x5t#S256": self.certificate_sha256}
        return claims


def from_claims(claims: JsonObject, *, token: str) -> Permit:
    """Read a verified payload. Raises PermitError (permit_invalid).

    A claim that is not known is refused, not ignored: it may be a restriction.
    """
    _members(claims, _CLAIMS, _OPTIONAL_CLAIMS)
    details = _typed(claims, "authorization_details", list)
    detail = details[0] if len(details) == 1 else None
    context = claims["tctx"]
    if not isinstance(detail, dict) or not isinstance(context, dict):
        raise _invalid()
    _members(detail, _DETAIL, _OPTIONAL_DETAIL)
    _members(context, _TENANT_CONTEXT, _OPTIONAL_TENANT_CONTEXT)
    audience = _text(claims, "aud")
    arguments_sha256 = _text(detail, "args_sha256") if "args_sha256" in detail else ""
    max_uses = _typed(detail, "max_uses", int) if "max_uses" in detail else 1
    issued_at = _typed(claims, "iat", int)
    if (
        detail["type"] != DETAIL_TYPE
        or detail["locations"] != [audience]
        or claims["nbf"] != issued_at
        or not 1 <= max_uses <= MAX_USES
    ):
        raise _invalid()
    if arguments_sha256:
        if not _SHA256.fullmatch(arguments_sha256) or max_uses != 1:
            raise _invalid()
    elif "identifier" in detail:
        raise _invalid()
    actions = _typed(detail, "actions", list)
    if len(actions) != 1 or not isinstance(actions[0], str):
        raise _invalid()
    scope = _typed(claims, "scope", str)
    return Permit(
        id=_text(claims, "jti"),
        issuer=_text(claims, "iss"),
        audience=audience,
        tenant=_text(context, "tenant"),
        actor=_text(claims, "sub"),
        tool=actions[0],
        arguments_sha256=arguments_sha256,
        scopes=tuple(scope.split(" ")) if scope else (),
        transaction=_text(claims, "txn"),
        decision_id=_text(context, "decision_id"),
        policy_revision=_text(context, "policy_revision"),
        ledger=_text(context, "ledger"),
        issued_at=issued_at,
        expires_at=_typed(claims, "exp", int),
        hold_id=_text(context, "hold_id") if "hold_id" in context else "",
        resource=_text(detail, "identifier") if "identifier" in detail else "",
        max_uses=max_uses,
        agents=_agents(claims["act"]) if "act" in claims else (),
        delegations=_delegations(context) if "delegations" in context else (),
        workload=_text(claims, "req_wl") if "req_wl" in claims else "",
        certificate_sha256=_thumbprint(claims["cnf"]) if "cnf" in claims else "",
        token=token,
    )


def _act(agents: Sequence[str]) -> JsonObject:
    """The act claim: who acts now is outermost (RFC 8693 4.1)."""
    act: JsonObject = {}
    for agent in agents:
        act = {"sub": agent, **({"act": act} if act else {})}
    return act


def _agents(value: JsonValue) -> tuple[str, ...]:
    agents: list[str] = []
    while isinstance(value, dict) and len(agents) < MAX_AGENTS:
        _members(value, frozenset({"sub"}), frozenset({"act"}))
        agents.append(_text(value, "sub"))
        if "act" not in value:
            return tuple(reversed(agents))
        value = value["act"]
    raise _invalid()


def _delegations(context: JsonObject) -> tuple[str, ...]:
    ids = [each for each in _typed(context, "delegations", list) if isinstance(each, str) and each]
    if not 1 <= len(ids) <= MAX_DELEGATIONS or ids != context["delegations"]:
        raise _invalid()
    return tuple(ids)


def _thumbprint(value: JsonValue) -> str:
    if isinstance(value, dict) and value.keys() == {"x5t#S256"}:
        thumbprint = _text(value, "x5t#S256")
        if _THUMBPRINT.fullmatch(thumbprint):
            return thumbprint
    raise _invalid()


def _invalid() -> PermitError:
    return PermitError(ReasonCode.PERMIT_INVALID, "The permit's claims are not those of a permit.")


def _members(claims: JsonObject, names: frozenset[str], optional: frozenset[str]) -> None:
    if claims.keys() - optional != names:
        raise _invalid()


_T = TypeVar("_T", str, int, list[JsonValue])


def _typed(claims: JsonObject, name: str, kind: type[_T]) -> _T:
    value = claims[name]
    if type(value) is not kind:
        raise _invalid()
    return value


def _text(claims: JsonObject, name: str) -> str:
    value = _typed(claims, name, str)
    if not value:
        raise _invalid()
    return value
