"""Whose delegations count at a sidecar."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from functools import partial

from pdp.config import Config
from pdp.delegating import issuer_of
from pdp.identity.claims import invalid
from pdp.identity.delegation import DelegatedIdentity
from pdp.identity.resolver import IdentityResolver
from pdp.identity.subject import Subject
from pdp.identity.tenancy import TenantRule
from pdp.permit.key_file import PublicKeyFile
from pdp.permit.ring import LiveKeys
from pdp.rooms import DelegationTerms


def with_delegations(
    otherwise: IdentityResolver,
    config: Config,
    keys: LiveKeys,
    stack: contextlib.AsyncExitStack,
    *,
    rules: Mapping[str, TenantRule],
) -> DelegatedIdentity:
    """Whoever tells whose call it is, and delegations besides: those that this sidecar's own
    keys have signed, and those of the sidecars that are trusted. ``rules`` says, by their
    issuer, which tenants users are of. Raises PermitError.
    """
    foreign = frozenset(
        tenant for trusted in config.delegation.trusted for tenant in trusted.tenants
    )
    issuers = [
        issuer_of(
            config.permit.issuer,
            keys,
            keys_version=lambda: keys.ring,
            check=partial(_check_tenant, rules=rules, foreign=foreign),
        )
    ]
    for trusted in config.delegation.trusted:
        theirs = PublicKeyFile(trusted.jwks_file)
        stack.callback(asyncio.create_task(theirs.keep_looking()).cancel)
        issuers.append(
            issuer_of(
                trusted.issuer,
                theirs,
                keys_version=lambda theirs=theirs: theirs.keys,  # type: ignore[misc]
                tenants=frozenset(trusted.tenants),
            )
        )
    return DelegatedIdentity(otherwise, issuers)


def _check_tenant(
    subject: Subject, *, rules: Mapping[str, TenantRule], foreign: frozenset[str]
) -> None:
    """Raises IdentityError for a tenant that neither the user's issuer could name here by
    now nor another domain's sidecars, whose agents may have delegated further here. The
    same keys may sign at a sidecar that is configured otherwise.
    """
    if subject.tenant in foreign:
        return
    rule = rules.get(subject.issuer)
    if rule is None:
        raise invalid("is of a user whose issuer is not trusted here")
    rule.check_still(subject.tenant, organisation=subject.organisation, actor=subject.actor)


def delegation_terms(config: Config) -> DelegationTerms:
    """How far callers may delegate."""
    settings = config.delegation
    return DelegationTerms(
        max_depth=settings.max_depth,
        ttl_seconds=settings.ttl_seconds,
        max_ttl_seconds=settings.max_ttl_seconds,
    )
