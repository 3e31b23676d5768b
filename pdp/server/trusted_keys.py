"""The keys of all issuers that are trusted, kept fresh while the sidecar runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Final

from pdp.canonical import JsonValue
from pdp.config import IssuerKeys
from pdp.identity.jwks_file import JwksFile
from pdp.identity.key_cache import KeyCache
from pdp.identity.key_source import KeyFetcher, KeySource
from pdp.identity.keys import IssuerKey
from pdp.server.metrics import Metrics

START_SECONDS: Final = 2.0
"""How long the start waits for keys. Without them calls are refused until they come."""


class TrustedKeys:
    """One source for each issuer, by its name."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._caches: dict[str, KeyCache] = {}

    def open(self, settings: IssuerKeys, issuer: str) -> KeySource:
        """The keys of one more issuer. A file is read at once, and what can not be used
        raises KeySourceError; other places are asked later.
        """
        keys: Mapping[str, IssuerKey] | None = None
        if settings.jwks_file is not None:
            file = JwksFile(settings.jwks_file)
            fetcher: KeyFetcher = file
            keys = file.read_first()
        else:
            fetcher = _fetcher(settings, issuer)
        cache = KeyCache(
            fetcher,
            keys=keys,
            poll_seconds=settings.seconds_between_looks,
            max_age_seconds=settings.max_age_seconds,
            fetched=partial(self._metrics.keys_fetched, issuer),
        )
        self._caches[issuer] = cache
        self._metrics.keys_are(issuer, cache)
        return cache

    @property
    def usable(self) -> bool:
        """Whether some issuer's tokens can be verified. One that is down is not to take
        the sidecar from the others' users.
        """
        return not self._caches or any(cache.usable for cache in self._caches.values())

    def status(self) -> list[JsonValue]:
        """How things stand with each issuer's keys, for operators."""
        return [
            {
                "issuer": issuer,
                "place": cache.place,
                "usable": cache.usable,
                "error": cache.error,
            }
            for issuer, cache in self._caches.items()
        ]

    @contextlib.asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """While the context lasts, all are looked at in time; then they are closed."""
        caches = self._caches.values()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await asyncio.gather(*(cache.look() for cache in caches if not cache.usable))
        looking = [asyncio.create_task(cache.keep_fresh()) for cache in caches]
        try:
            yield
        finally:
            for task in looking:
                task.cancel()
            for cache in caches:
                await cache.close()


def _fetcher(settings: IssuerKeys, issuer: str) -> KeyFetcher:
    # Only here: a sidecar whose keys are in files needs neither client.
    if settings.workload_api is not None:
        from pdp.identity.spiffe_bundles import SpiffeBundle  # noqa: PLC0415

        return SpiffeBundle(settings.workload_api, trust_domain=issuer)
    from pdp.identity.jwks_http import DiscoveredJwks, JwksUrl  # noqa: PLC0415

    ca_file, token_file = settings.ca_file, settings.bearer_token_file
    if settings.jwks_url is not None:
        return JwksUrl(settings.jwks_url, ca_file=ca_file, bearer_token_file=token_file)
    return DiscoveredJwks(issuer, ca_file=ca_file, bearer_token_file=token_file)
