"""Whose delegations count at a sidecar."""

from __future__ import annotations

import asyncio
import contextlib

from pdp.config import Config
from pdp.delegating import issuer_of
from pdp.identity.delegation import DelegatedIdentity
from pdp.identity.resolver import IdentityResolver
from pdp.permit.key_file import PublicKeyFile
from pdp.permit.ring import LiveKeys
from pdp.rooms import DelegationTerms


def with_delegations(
    otherwise: IdentityResolver, config: Config, keys: LiveKeys, stack: contextlib.AsyncExitStack
) -> DelegatedIdentity:
    """Whoever tells whose call it is, and delegations besides: those that this sidecar's own
    keys have signed, and those of the sidecars that are trusted. Raises PermitError.
    """
    issuers = [issuer_of(config.permit.issuer, keys, keys_version=lambda: keys.ring)]
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


def delegation_terms(config: Config) -> DelegationTerms:
    """How far callers may delegate."""
    settings = config.delegation
    return DelegationTerms(
        max_depth=settings.max_depth,
        ttl_seconds=settings.ttl_seconds,
        max_ttl_seconds=settings.max_ttl_seconds,
    )
