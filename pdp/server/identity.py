"""Identify, as configured: who tells whose call it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from pdp.config import Config, JwtIssuer, SingleTenantIdentity, TenantClaim, WorkloadIdentity
from pdp.config import WorkloadIssuer as WorkloadIssuerSettings
from pdp.identity.organisations import OrganisationFile
from pdp.identity.principals import Principals
from pdp.identity.resolver import IdentityResolver, SingleTenant
from pdp.identity.tenancy import Routes, TenantRule, WorkloadRoute
from pdp.identity.tokens import Issuer, TokenIdentity
from pdp.identity.workloads import WorkloadIssuer, Workloads, WorkloadTokens
from pdp.permit.ring import LiveKeys
from pdp.server.delegations import with_delegations
from pdp.server.trusted_keys import TrustedKeys


def open_identity(
    config: Config,
    keys: LiveKeys,
    trusted_keys: TrustedKeys,
    stack: contextlib.AsyncExitStack,
    *,
    changed: Callable[[], None],
) -> IdentityResolver:
    """Who tells whose call it is. ``keys`` are the permit keys, which sign delegations too.
    ``changed`` is called when a token may be another tenant's than before. Raises
    KeySourceError, OrganisationFileError, PermitError.
    """
    identity = config.identity
    if isinstance(identity, SingleTenantIdentity):
        actors: IdentityResolver = SingleTenant(
            actor=identity.actor, roles=tuple(identity.roles), scopes=tuple(identity.scopes)
        )
        rules = {"": TenantRule(fixed=SingleTenant.TENANT)}
        routes = Routes()
    else:
        issuers = [_issuer(issuer, trusted_keys, stack, changed) for issuer in identity.issuers]
        rules = {issuer.issuer: issuer.tenant for issuer in issuers}
        actors = TokenIdentity(issuers)
        routes = Routes(
            listeners={
                route.listener: route.tenant
                for route in identity.routes
                if route.listener is not None and route.tenant is not None
            },
            workloads=[
                WorkloadRoute.of(route.workload, route.tenant or "")
                for route in identity.routes
                if route.workload is not None
            ],
            server_names={
                route.server_name: route.tenant
                for route in identity.routes
                if route.server_name is not None and route.tenant is not None
            },
        )
    workloads = None if identity.workload is None else _workloads(identity.workload, trusted_keys)
    actors = with_delegations(actors, config, keys, stack, rules=rules)
    return Principals(actors, workloads=workloads, routes=routes)


def tenant_of_listener(config: Config, listener: str) -> str:
    """The tenant that comes by this listener and no other; empty for everybody's."""
    identity = config.identity
    routes = () if isinstance(identity, SingleTenantIdentity) else identity.routes
    return next((route.tenant or "" for route in routes if route.listener == listener), "")


def _issuer(
    settings: JwtIssuer,
    trusted_keys: TrustedKeys,
    stack: contextlib.AsyncExitStack,
    changed: Callable[[], None],
) -> Issuer:
    return Issuer(
        issuer=settings.issuer,
        audiences=frozenset(settings.audiences),
        types=frozenset(kind.lower() for kind in settings.types),
        algorithms=frozenset(settings.algorithms),
        keys=trusted_keys.open(settings, settings.issuer),
        tenant=_tenant_rule(settings.tenant, stack, changed),
        actor_claim=settings.actor_claim,
        actor_prefix=settings.actor_prefix,
        roles_claim=settings.roles_claim,
        scopes_claim=settings.scopes_claim,
        organisation_claim=settings.organisation_claim,
        team_claim=settings.team_claim,
        session_claim=settings.session_claim,
        leeway_seconds=settings.leeway_seconds,
    )


def _tenant_rule(
    settings: TenantClaim, stack: contextlib.AsyncExitStack, changed: Callable[[], None]
) -> TenantRule:
    tenants = None if settings.tenants is None else frozenset(settings.tenants)
    if settings.fixed is not None:
        return TenantRule(fixed=settings.fixed)
    if settings.by_route:
        return TenantRule(by_route=True, tenants=tenants)
    if settings.organisations_file is None:
        return TenantRule(
            claim=settings.claim, organisations=settings.organisations, tenants=tenants
        )
    organisations = OrganisationFile(settings.organisations_file)
    stack.callback(asyncio.create_task(organisations.keep_looking(changed)).cancel)
    return TenantRule(claim=settings.claim, organisations=organisations, tenants=tenants)


def _workloads(settings: WorkloadIdentity, trusted_keys: TrustedKeys) -> Workloads:
    return Workloads(
        required=settings.required,
        certificates=settings.certificates,
        trust_domains=(
            None if settings.trust_domains is None else frozenset(settings.trust_domains)
        ),
        tokens=WorkloadTokens(
            [_workload_issuer(issuer, trusted_keys) for issuer in settings.issuers]
        ),
    )


def _workload_issuer(settings: WorkloadIssuerSettings, trusted_keys: TrustedKeys) -> WorkloadIssuer:
    trust_domain = settings.trust_domain
    return WorkloadIssuer(
        issuer=Issuer(
            issuer=settings.name,
            audiences=frozenset(settings.audiences),
            # A JWT-SVID need not name a type (JWT-SVID 2.2), and Kubernetes names none.
            types=frozenset({"", "jwt", "jose"}),
            algorithms=frozenset(settings.algorithms),
            keys=trusted_keys.open(settings, settings.name),
            leeway_seconds=settings.leeway_seconds,
        ),
        trust_domain=trust_domain or "",
        cluster=settings.cluster or "",
    )
