"""Which tenant: what an issuer's tokens may name, what a route names, and that all agree."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pdp.identity.resolver import IdentityError
from pdp.identity.subject import TENANT_PATTERN
from pdp.reason import ReasonCode


class Organisations(Protocol):
    """Which tenant an organisation is."""

    def get(self, organisation: str, /) -> str | None:
        """The tenant; None for an organisation that is not known."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRule:
    """Where the tenant of an issuer's tokens comes from. A rule that says nothing gives none."""

    claim: str = ""
    """The claim that holds the tenant id, or the organisation id."""
    organisations: Organisations | None = None
    """None when the claim is the tenant id itself."""
    fixed: str = ""
    """The one tenant that all tokens of the issuer are of, in place of a claim."""
    by_route: bool = False
    """Whether the route names it, in place of a claim."""
    tenants: frozenset[str] | None = None
    """The only ones that it may come to; None for all."""

    def tenant_of(self, named: str, *, route_tenant: str, actor: str) -> str:
        """The tenant of a token whose claim says ``named``, on a call by the route of
        ``route_tenant``; either is empty where there is none. Raises IdentityError.
        """
        if self.fixed:
            return self.fixed
        tenant: str | None = route_tenant if self.by_route else named
        if not tenant:
            raise IdentityError(ReasonCode.TENANT_MISSING, self._missing, actor=actor)
        if self.organisations is not None:
            tenant = self.organisations.get(tenant)
            if tenant is None:
                raise IdentityError(
                    ReasonCode.TENANT_UNKNOWN,
                    "The token's organisation is no tenant here.",
                    actor=actor,
                )
        if self.tenants is not None and tenant not in self.tenants:
            raise IdentityError(
                ReasonCode.TENANT_UNKNOWN,
                "The token's issuer may not speak for this tenant.",
                actor=actor,
            )
        return tenant

    def check_still(self, tenant: str, *, organisation: str, actor: str) -> None:
        """Raises IdentityError where a token of the issuer, for this organisation if it has
        one, could not be of the tenant now, whatever it was before.
        """
        named = organisation if self.organisations is not None else tenant
        expected = self.tenant_of(named, route_tenant=tenant, actor=actor)
        agreed((Source("token", tenant), Source("issuer", expected)), actor=actor)

    @property
    def _missing(self) -> str:
        if self.by_route:
            return "The call did not come by the route of a tenant."
        return f"The token names no tenant ({self.claim})."


@dataclass(frozen=True, slots=True)
class Source:
    """What one trusted source says."""

    name: str
    """"token", "issuer" (what the user's issuer says by now), "listener", "workload" or
    "server_name"."""
    tenant: str


def agreed(sources: Sequence[Source], *, actor: str | None = None) -> str:
    """The tenant that they all name; empty where there are none. Raises IdentityError
    (tenant_mismatch) with what each says.
    """
    tenants = {source.tenant for source in sources}
    if len(tenants) > 1:
        raise IdentityError(
            ReasonCode.TENANT_MISMATCH,
            "The token, its issuer and the routes of the call do not all name the same tenant.",
            actor=actor,
            sources=tuple((source.name, source.tenant) for source in sources),
        )
    return tenants.pop() if tenants else ""


_WILDCARD: Final = re.compile(r"\{tenant\}|\*\*?")
_ONE: Final = r"[^/:]+"
_BEFORE_WILDCARDS: Final = re.compile(
    r"spiffe://[a-z0-9._-]+/.*|([a-z0-9-]+/)?system:serviceaccount:.*", re.DOTALL
)
"""Trust domain, or kind of name, are always written out."""


@dataclass(frozen=True, slots=True)
class WorkloadRoute:
    """Workloads whose calls are those of one tenant."""

    pattern: re.Pattern[str]
    tenant: str
    """Empty where the pattern has a group that names it."""

    @classmethod
    def of(cls, workload: str, tenant: str) -> WorkloadRoute:
        """``workload`` is a name; in a SPIFFE id or a service account, between its
        separators, ``*`` stands for any one part, ``{tenant}`` for the part that is the
        tenant, and ``**`` at the end for whatever follows. Raises ValueError.
        """
        found = [match.start() for match in _WILDCARD.finditer(workload)]
        if found and not _BEFORE_WILDCARDS.fullmatch(workload[: found[0]]):
            raise ValueError(
                "wildcards may stand after spiffe://TRUST-DOMAIN/ or system:serviceaccount: only"
            )
        named = workload.count("{tenant}")
        if named != (0 if tenant else 1):
            raise ValueError("name the tenant once: as tenant, or as {tenant} in workload")
        parts = re.split(r"([/:])", workload)
        written = [_part(part, last=index == len(parts) - 1) for index, part in enumerate(parts)]
        return cls(re.compile("".join(written)), tenant)

    def tenant_of(self, workload: str) -> str | None:
        """The tenant; None for a workload that is not meant. Raises IdentityError."""
        match = self.pattern.fullmatch(workload)
        if match is None:
            return None
        tenant = self.tenant or match["tenant"]
        if not TENANT_PATTERN.fullmatch(tenant):
            raise IdentityError(
                ReasonCode.TENANT_UNKNOWN, "The workload's name holds no tenant's id."
            )
        return tenant


def _part(part: str, *, last: bool) -> str:
    if part == "{tenant}":
        return rf"(?P<tenant>{_ONE})"
    if part == "*":
        return _ONE
    if part == "**" and last:
        return rf"{_ONE}(?:[/:]{_ONE})*"
    if _WILDCARD.search(part):
        raise ValueError("a wildcard stands for a whole part, and ** at the end only")
    return re.escape(part)


class Routes:
    """Which tenants the listener, the workload and the server name of a call stand for."""

    def __init__(
        self,
        *,
        listeners: Mapping[str, str] | None = None,
        workloads: Iterable[WorkloadRoute] = (),
        server_names: Mapping[str, str] | None = None,
    ) -> None:
        """``listeners`` and ``server_names`` give the tenant by the name, the latter in
        lower case.
        """
        self._listeners = listeners or {}
        self._server_names = server_names or {}
        self._workloads = tuple(workloads)
        self._tenants_of = functools.lru_cache(maxsize=_REMEMBERED_WORKLOADS)(self._find)

    def sources(self, *, listener: str, workload: str) -> tuple[Source, ...]:
        """What they say. Several routes of one workload all count. Raises IdentityError."""
        tenant = self._listeners.get(listener)
        by_listener = () if tenant is None else (Source("listener", tenant),)
        return by_listener + (self._tenants_of(workload) if workload else ())

    def asked_for(self, server_name: str) -> tuple[Source, ...]:
        """What the server name says. As the caller writes it, it can only disagree."""
        tenant = self._server_names.get(server_name.lower())
        return () if tenant is None else (Source("server_name", tenant),)

    def _find(self, workload: str) -> tuple[Source, ...]:
        tenants = (route.tenant_of(workload) for route in self._workloads)
        return tuple(Source("workload", tenant) for tenant in tenants if tenant is not None)


_REMEMBERED_WORKLOADS: Final = 1_024
