"""The workload: which runtime asks, by its certificate or by a token of its own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.identity.resolver import Credentials, IdentityError, Peer
from pdp.identity.tokens import Issuer, RememberedTokens, TokenVerifier, VerifiedToken
from pdp.reason import ReasonCode

MAX_WORKLOAD_LENGTH: Final = 255
"""Longest name of a workload, in characters."""
MAX_LIFETIME_SECONDS: Final = 86_400
"""A workload's token that lasts longer than this is refused."""

_SPIFFE_ID: Final = re.compile(
    r"spiffe://(?P<domain>[a-z0-9._-]+)(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)+"
)
"""Of a workload (SPIFFE-ID 2): with a path, whose parts are neither empty nor dots alone."""
_DNS_NAME: Final = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
"""In lower case, with no wildcard and no dot at the end."""
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*://[\x21-\x7e]+")
_ACCOUNT: Final = re.compile(r"system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,253})")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadIssuer:
    """Who issues tokens to workloads. An issuer of users' tokens is never one."""

    issuer: Issuer
    """Of a trust domain: its issuer is ``spiffe://`` and the domain, as a JWT-SVID need
    not name one."""
    trust_domain: str = ""
    """The SPIFFE trust domain that it speaks for; empty for a Kubernetes cluster."""
    cluster: str = ""
    """Stands before the names of a cluster's service accounts, where there are several
    clusters."""


class WorkloadTokens:
    """Verifies tokens of workloads: JWT-SVIDs, and service accounts' tokens."""

    def __init__(
        self,
        issuers: Sequence[WorkloadIssuer],
        *,
        clock: Callable[[], float] = time.time,
        cache_entries: int = 1_000,
    ) -> None:
        self._issuers = {each.issuer.issuer: each for each in issuers}
        self._clock = clock
        verifier = TokenVerifier(
            [each.issuer for each in issuers], clock=clock, issuer_named=_issuer_named
        )
        self._tokens = RememberedTokens(verifier, self._name, clock=clock, entries=cache_entries)

    async def workload_of(self, token: str) -> str:
        """The workload that a token names. Raises IdentityError."""
        try:
            return await self._tokens.verify(token)
        except IdentityError as error:
            if error.reason_code not in _OF_THE_TOKEN:
                raise
            raise _invalid(error.message.replace("The token", "The workload's token")) from None

    def _name(self, token: VerifiedToken) -> str:
        if token.expires_at > self._clock() + MAX_LIFETIME_SECONDS:
            raise _invalid("The workload's token lasts for longer than a day.")
        issuer = self._issuers[token.issuer.issuer]
        if issuer.trust_domain:
            return _spiffe_id(token.claims.get("sub"), frozenset({issuer.trust_domain}))
        name = _service_account(token.claims)
        return f"{issuer.cluster}/{name}" if issuer.cluster else name


_OF_THE_TOKEN: Final = frozenset({ReasonCode.TOKEN_INVALID, ReasonCode.TOKEN_EXPIRED})


def _issuer_named(claims: JsonObject) -> JsonValue:
    """The trust domain of a JWT-SVID (JWT-SVID 3); else the issuer."""
    subject = claims.get("sub")
    if isinstance(subject, str) and (found := _SPIFFE_ID.fullmatch(subject)):
        return f"spiffe://{found['domain']}"
    return claims.get("iss")


class Workloads:
    """Which workload a call is of."""

    def __init__(
        self,
        *,
        required: bool,
        certificates: bool,
        trust_domains: frozenset[str] | None = None,
        tokens: WorkloadTokens,
    ) -> None:
        """``certificates`` says that client certificates name workloads, and
        ``trust_domains`` that they must do so by a SPIFFE id of one of these.
        """
        self._required = required
        self._certificates = certificates
        self._trust_domains = trust_domains
        self._tokens = tokens

    async def workload_of(self, credentials: Credentials) -> str:
        """Its name; empty where it shows nothing, and need not. Raises IdentityError
        (workload_missing, workload_invalid).
        """
        names = set()
        if self._certificates and credentials.peer.certificate_sha256:
            names.add(self._certified(credentials.peer))
        if credentials.workload_token:
            names.add(await self._tokens.workload_of(credentials.workload_token))
        if len(names) > 1:
            raise _invalid("The workload's certificate and its token name different workloads.")
        if not names and self._required:
            raise IdentityError(
                ReasonCode.WORKLOAD_MISSING,
                "Show which workload asks: by a client certificate, or by a token in metadata"
                " 'workload-authorization'.",
            )
        return names.pop() if names else ""

    def _certified(self, peer: Peer) -> str:
        """The name in a certificate: its one URI or, where it has none, its one DNS name."""
        names, form = (peer.uris, _URI) if peer.uris else (peer.dns_names, _DNS_NAME)
        name = names[0] if len(names) == 1 else ""
        if peer.uris and name.lower().startswith("spiffe:"):
            return _spiffe_id(name, self._trust_domains)
        if len(name) > MAX_WORKLOAD_LENGTH or not form.fullmatch(name):
            raise _invalid("The client certificate does not name one workload.")
        if self._trust_domains is not None:
            raise _invalid("The client certificate names no SPIFFE id.")
        return name


def _spiffe_id(name: JsonValue, trust_domains: frozenset[str] | None) -> str:
    found = _SPIFFE_ID.fullmatch(name) if isinstance(name, str) else None
    if found is None or len(found[0]) > MAX_WORKLOAD_LENGTH:
        raise _invalid("The workload does not have the SPIFFE id of a workload.")
    if trust_domains is not None and found["domain"] not in trust_domains:
        raise _invalid("The workload's SPIFFE id is of another trust domain.")
    return found[0]


def _service_account(claims: JsonObject) -> str:
    """The account of a projected token, in which everything that names it must agree."""
    subject = claims.get("sub")
    found = _ACCOUNT.fullmatch(subject) if isinstance(subject, str) else None
    bound = claims.get("kubernetes.io")
    if found is None or len(found[0]) > MAX_WORKLOAD_LENGTH or not isinstance(bound, dict):
        raise _invalid("The workload's token is not one of a service account.")
    namespace, account = found.groups()
    if bound.get("namespace") != namespace or _member(bound, "serviceaccount") != account:
        raise _invalid("The workload's token names different service accounts.")
    if not _member(bound, "pod"):
        raise _invalid("The workload's token is not bound to a pod: have it projected into one.")
    return found[0]


def _member(bound: JsonObject, kind: str) -> str | None:
    """The name of what a token is bound to."""
    member = bound.get(kind)
    name = member.get("name") if isinstance(member, dict) else None
    return name if isinstance(name, str) else None


def _invalid(message: str) -> IdentityError:
    return IdentityError(ReasonCode.WORKLOAD_INVALID, message)
