"""An identity provider on loopback that can be made to behave in any way."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from joserfc.jwk import OKPKey

from pdp.testing import TokenIssuer

Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


class IdentityProvider:
    """Publishes keys under /jwks.json, and says so in its discovery document."""

    def __init__(self) -> None:
        self.issuers: list[TokenIssuer] = []
        """Whose keys are published."""
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        """Of every request."""
        self.behaviour: Behaviour | None = None
        """In place of the usual answers."""
        self.discovery: dict[str, Any] = {}
        """In place of what the discovery document usually says."""

    def publish(self, *issuers: TokenIssuer) -> None:
        self.issuers = list(issuers)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.path] += 1
        self.headers.append(dict(request.headers))
        if self.behaviour is not None:
            return await self.behaviour(request)
        if request.path == "/jwks.json":
            return _with_etag(request, {"keys": [public_jwk(each) for each in self.issuers]})
        if request.path.endswith("/.well-known/openid-configuration"):
            origin = f"{request.scheme}://{request.host}"
            usual = {"issuer": origin, "jwks_uri": f"{origin}/jwks.json"}
            return _with_etag(request, {**usual, **self.discovery})
        return web.Response(status=404)


def public_jwk(issuer: TokenIssuer) -> dict[str, Any]:
    key: OKPKey = issuer._key
    return {**key.as_dict(private=False), "kid": issuer.kid, "use": "sig", "alg": "EdDSA"}


def _with_etag(request: web.Request, document: dict[str, Any]) -> web.Response:
    body = json.dumps(document).encode()
    etag = f'"{hashlib.sha256(body).hexdigest()}"'
    if request.headers.get("If-None-Match") == etag:
        return web.Response(status=304)
    return web.Response(body=body, headers={"ETag": etag}, content_type="application/json")


async def down(_request: web.Request) -> web.StreamResponse:
    return web.Response(status=503)


async def until(done: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 - what is waited for is on another thread
            await asyncio.sleep(0.005)
