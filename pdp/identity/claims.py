"""What the claims of a verified token say: the subject, and above all its tenant."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from pdp.identity.tenancy import TenantRule
from pdp.reason import ReasonCode

if TYPE_CHECKING:
    from pdp.identity.tokens import VerifiedToken

MAX_NAMES: Final = 256
"""Most roles, and most scopes, of one token."""
MAX_NAME_LENGTH: Final = 255


class Claimed:
    """What a verified token says. Its tenant is worked out for each call, as organisations
    and routes can change while the token lasts.
    """

    __slots__ = ("_last", "_named", "_rule", "_subject")

    def __init__(self, rule: TenantRule, named: str, subject: partial[Subject]) -> None:
        """``named`` is what the rule's claim says, empty where it has none; ``subject`` is
        all of the subject but its tenant.
        """
        self._rule = rule
        self._named = named
        self._subject = subject
        self._last: Subject | None = None

    def subject(self, *, route_tenant: str) -> Subject:
        """The subject, on a call by the route of that tenant, empty where there is none.
        Raises IdentityError.
        """
        actor = self._subject.keywords["actor"]
        tenant = self._rule.tenant_of(self._named, route_tenant=route_tenant, actor=actor)
        if self._last is None or self._last.tenant != tenant:
            self._last = self._subject(tenant=tenant)
        return self._last


def read_claims(token: VerifiedToken) -> Claimed:
    """What the claims of a verified token say. Raises IdentityError."""
    claims, issuer = token.claims, token.issuer
    actor = claims.get(issuer.actor_claim)
    if not _is_name(actor, MAX_NAME_LENGTH - len(issuer.actor_prefix)):
        raise invalid(f"names no actor ({issuer.actor_claim})")
    token_id = claims.get("jti", "")
    if token_id and not _is_name(token_id):
        raise invalid("has an id (jti) that is not a short text")
    rule = issuer.tenant
    subject = partial(
        Subject,
        actor=f"{issuer.actor_prefix}{actor}",
        roles=_names(claims, issuer.roles_claim),
        scopes=_names(claims, issuer.scopes_claim),
        organisation=_optional_name(
            claims,
            issuer.organisation_claim if rule.organisations is None else rule.claim,
            MAX_ORGANISATION_LENGTH,
        ),
        team=_optional_name(claims, issuer.team_claim, MAX_TEAM_LENGTH),
        session=_optional_name(claims, issuer.session_claim, MAX_SESSION_LENGTH),
        issuer=issuer.issuer,
        token_id=str(token_id),
        expires_at=token.expires_at,
    )
    return Claimed(rule, _named_tenant(claims, rule), subject)


def _named_tenant(claims: JsonObject, rule: TenantRule) -> str:
    """The tenant id, or the organisation, that the rule's claim holds."""
    if not rule.claim:
        return ""
    named = claims.get(rule.claim)
    if named is None or named == "":
        return ""
    if not isinstance(named, str):
        raise invalid(f"has a {rule.claim} that is not a text")
    if rule.organisations is None and not TENANT_PATTERN.fullmatch(named):
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
