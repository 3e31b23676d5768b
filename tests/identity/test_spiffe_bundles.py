"""Keys of a trust domain, from an agent that speaks the SPIFFE Workload API."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from pdp.api.spiffe.workload_pb2 import JWTBundlesRequest, JWTBundlesResponse
from pdp.api.spiffe.workload_pb2_grpc import (
    SpiffeWorkloadAPIServicer,
    add_SpiffeWorkloadAPIServicer_to_server,
)
from pdp.identity import spiffe_bundles
from pdp.identity.key_cache import KeyCache
from pdp.identity.key_source import KeySourceError
from pdp.identity.resolver import IdentityError
from pdp.identity.spiffe_bundles import SpiffeBundle
from pdp.identity.tokens import Issuer
from pdp.identity.workloads import WorkloadIssuer, WorkloadTokens
from pdp.testing import TokenIssuer
from tests.identity.identity_provider import public_jwk

T = TypeVar("T")
ONE, TWO = TokenIssuer(kid="one"), TokenIssuer(kid="two")
DOMAIN = "spiffe://example.org"


def bundle(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


class Agent(SpiffeWorkloadAPIServicer):
    """As SPIRE's: it refuses who does not say what is asked, and keeps streams open."""

    def __init__(self) -> None:
        self.bundles = {DOMAIN: bundle(public_jwk(ONE))}
        self.hangs = self.hangs_up = False

    async def FetchJWTBundles(  # noqa: N802 - as the service is written
        self, request: JWTBundlesRequest, context: Any
    ) -> AsyncIterator[JWTBundlesResponse]:
        if ("workload.spiffe.io", "true") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
        if self.hangs_up:
            return
        if not self.hangs:
            yield JWTBundlesResponse(bundles=self.bundles)
        await asyncio.Event().wait()


def with_agent(work: Callable[[Agent, SpiffeBundle], Awaitable[T]]) -> T:
    async def run(directory: str) -> T:
        agent, server = Agent(), grpc.aio.server()
        add_SpiffeWorkloadAPIServicer_to_server(agent, server)
        address = f"unix://{directory}/agent.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            return await work(agent, SpiffeBundle(address, trust_domain=DOMAIN))
        finally:
            await server.stop(0)

    # The path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="pdp-") as directory:
        return asyncio.run(run(directory))


def refusal(**changes: Any) -> str:
    async def work(agent: Agent, source: SpiffeBundle) -> str:
        for name, value in changes.items():
            setattr(agent, name, value)
        with pytest.raises(KeySourceError) as refused:
            await source.fetch()
        assert refused.value.reason_code == "keys_unavailable"
        return refused.value.message

    return with_agent(work)


def test_keys_are_taken_from_the_agent_as_they_change() -> None:
    async def work(agent: Agent, source: SpiffeBundle) -> None:
        first = await source.fetch()
        assert set(first) == {"one"}
        assert await source.fetch() is first
        agent.bundles = {DOMAIN: bundle(public_jwk(ONE), public_jwk(TWO))}
        assert set(await source.fetch()) == {"one", "two"}
        agent.bundles = {DOMAIN: bundle(public_jwk(TWO))}
        assert set(await source.fetch()) == {"two"}

    with_agent(work)


@pytest.mark.parametrize("name", (DOMAIN, "example.org"))
@pytest.mark.parametrize("use", ("jwt-svid", "sig", None))
def test_bundles_are_read_as_agents_write_them(name: str, use: str | None) -> None:
    key = {key: value for key, value in public_jwk(ONE).items() if key != "use"}
    if use is not None:
        key["use"] = use
    certificate = {**public_jwk(TWO), "use": "x509-svid"}

    async def work(agent: Agent, source: SpiffeBundle) -> None:
        agent.bundles = {name: bundle(key, certificate), "spiffe://other.example": bundle()}
        assert set(await source.fetch()) == {"one"}

    with_agent(work)


@pytest.mark.parametrize(
    "name",
    (
        "spiffe://other.example",
        "spiffe://example.org/",
        "spiffe://example.org.attacker.example",
        "spiffe://EXAMPLE.ORG",
        "",
    ),
)
def test_keys_of_another_trust_domain_are_none_of_this_one(name: str) -> None:
    message = refusal(bundles={name: bundle(public_jwk(ONE))})
    assert "is of a trust domain that the agent does not know" in message


def test_what_is_no_bundle_is_refused() -> None:
    assert "is not JSON" in refusal(bundles={DOMAIN: b""})
    assert 'needs "keys"' in refusal(bundles={DOMAIN: b"{}"})
    assert "private or symmetric" in refusal(
        bundles={DOMAIN: bundle({**public_jwk(ONE), "d": "AAAA"})}
    )
    huge = b'{"keys": [' + b" " * 1024 * 1024 + b"]}"
    assert "at most 1048576 are read" in refusal(bundles={DOMAIN: huge})
    assert "RESOURCE_EXHAUSTED" in refusal(bundles={DOMAIN: b" " * 5 * 1024 * 1024})


def test_an_agent_that_is_silent_or_hangs_up_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "the agent hung up" in refusal(hangs_up=True)
    monkeypatch.setattr(spiffe_bundles, "CALL_SECONDS", 0.1)
    assert "can not be fetched: DEADLINE_EXCEEDED" in refusal(hangs=True)


def test_a_jwt_svid_is_verified_with_the_keys_that_the_agent_knows() -> None:
    async def work(agent: Agent, source: SpiffeBundle) -> list[str]:
        cache = KeyCache(source, poll_seconds=0.01, max_age_seconds=60)
        workloads = WorkloadTokens(
            [
                WorkloadIssuer(
                    issuer=Issuer(
                        issuer=DOMAIN,
                        audiences=frozenset({"pdp"}),
                        types=frozenset({"", "jwt", "jose"}),
                        algorithms=frozenset({"EdDSA"}),
                        keys=cache,
                    ),
                    trust_domain="example.org",
                )
            ]
        )
        svids = [
            issuer.token(None, f"{DOMAIN}/agent", aud=["pdp"], iss=None) for issuer in (ONE, TWO)
        ]
        said = [await workloads.workload_of(svids[0])]
        agent.bundles = {DOMAIN: bundle(public_jwk(TWO))}
        await cache.look()
        for svid in svids:
            try:
                said.append(await workloads.workload_of(svid))
            except IdentityError as error:
                said.append(error.reason_code)
        await cache.close()
        return said

    workload = f"{DOMAIN}/agent"
    assert with_agent(work) == [workload, "workload_invalid", workload]


def test_where_no_agent_is_there_is_an_error(tmp_path: Path) -> None:
    source = SpiffeBundle(f"unix://{tmp_path}/agent.sock", trust_domain=DOMAIN)
    with pytest.raises(KeySourceError, match=r"agent\.sock can not be fetched: UNAVAILABLE"):
        asyncio.run(source.fetch())


def test_an_agent_refuses_who_does_not_send_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spiffe_bundles, "_METADATA", ())
    assert "INVALID_ARGUMENT" in refusal()
