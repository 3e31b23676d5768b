"""What the claims of a verified token say: the subject, and above all its tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pdp.canonical import JsonObject, JsonValue
from pdp.identity.resolver import IdentityError
from pdp.identity.subject import (
    MAX_ORGANISATION_LENGTH,
    MAX_SESSION_LENGTH,
    MAX_TEAM_LENGTH,
    TENANT_PATTERN,
    Subject,
)
from pdp.reason import ReasonCode

if TYPE_CHECKING:
    from pdp.identity.tokens import Issuer

MAX_NAMES: Final = 256
"""Most roles, and most scopes, of one token."""
MAX_NAME_LENGTH: Final = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRule:
    """How an issuer's token names its tenant."""

    claim: str
    """The claim that holds the tenant id, or the organisation id."""
    organisations: Mapping[str, str] | None = None
    """Organisation id to tenant id; None when the claim is the tenant id itself."""


def subject_of(claims: JsonObject, issuer: Issuer, *, expires_at: float) -> Subject:
    """The subject that a verified token of ``issuer`` names. Raises IdentityError."""
    actor = claims.get(issuer.actor_claim)
    if not _is_name(actor):
        raise invalid(f"names no actor ({issuer.actor_claim})")
    token_id = claims.get("jti", "")
    if token_id and not _is_name(token_id):
        raise invalid("has an id (jti) that is not a short text")
    return Subject(
        tenant=_tenant(claims, issuer, str(actor)),
        actor=str(actor),
        roles=_names(claims, issuer.roles_claim),
        scopes=_names(claims, issuer.scopes_claim),
        organisation=_optional_name(
            claims,
            issuer.organisation_claim
            if issuer.tenant.organisations is None
            else issuer.tenant.claim,
            MAX_ORGANISATION_LENGTH,
        ),
        team=_optional_name(claims, issuer.team_claim, MAX_TEAM_LENGTH),
        session=_optional_name(claims, issuer.session_claim, MAX_SESSION_LENGTH),
        issuer=issuer.issuer,
        token_id=str(token_id),
        expires_at=expires_at,
    )


def _tenant(claims: JsonObject, issuer: Issuer, actor: str) -> str:
    rule = issuer.tenant
    named = claims.get(rule.claim)
    if named is None or named == "":
        raise IdentityError(
            ReasonCode.TENANT_MISSING, f"The token names no tenant ({rule.claim}).", actor=actor
        )
    if not isinstance(named, str):
        raise invalid(f"has a {rule.claim} that is not a text")
    if rule.organisations is not None:
        tenant = rule.organisations.get(named)
        if tenant is None:
            raise IdentityError(
                ReasonCode.TENANT_UNKNOWN,
                "The token's organisation is no tenant here.",
                actor=actor,
            )
        return tenant
    if not TENANT_PATTERN.fullmatch(named):
        raise invalid(f"has a {rule.claim} that is not a tenant id")
    return named


def _optional_name(claims: JsonObject, claim: str | None, longest: int) -> str:
    value = claims.get(claim) if claim is not None else None
    if value is None or value == "":
        return ""
    if not _is_name(value, longest):
        raise invalid(f"has a {claim} that is not a text of at most {longest} characters")
    return str(value)


def _names(claims: JsonObject, claim: str) -> tuple[str, ...]:
    """A list of texts, or one text with spaces between (RFC 8693 4.2)."""
    value = claims.get(claim)
    if value is None:
        return ()
    names: Sequence[JsonValue] = value.split(" ") if isinstance(value, str) else []
    if isinstance(value, list):
        names = value
    elif not isinstance(value, str):
        raise invalid(f"has a {claim} that is neither a text nor a list")
    names = [name for name in names if name != ""]
    if len(names) > MAX_NAMES or not all(_is_name(name) for name in names):
        raise invalid(f"has a {claim} that is too long, or not of short texts")
    return tuple(sorted({str(name) for name in names}))


def _is_name(value: JsonValue, longest: int = MAX_NAME_LENGTH) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def invalid(what: str) -> IdentityError:
    """A token that is refused, and what it does wrong."""
    return IdentityError(ReasonCode.TOKEN_INVALID, f"The token {what}.")
