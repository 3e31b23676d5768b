"""Keys of a SPIFFE trust domain, from the Workload API of the agent on this machine.

https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Workload_API.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import grpc

from pdp.api.spiffe.workload_pb2 import JWTBundlesRequest, JWTBundlesResponse
from pdp.api.spiffe.workload_pb2_grpc import SpiffeWorkloadAPIStub
from pdp.identity.key_source import fault_of
from pdp.identity.keys import MAX_JWKS_BYTES, IssuerKey, JwksError, parse_jwks

SCHEME: Final = "spiffe://"
CALL_SECONDS: Final = 5.0
"""Longest time until the agent has answered."""
MAX_MESSAGE_BYTES: Final = 4 * MAX_JWKS_BYTES
"""Of an answer, which holds federated trust domains too."""
_METADATA: Final = (("workload.spiffe.io", "true"),)
"""Without it an agent refuses: so that nobody can be made to ask by a URL alone."""
_USES: Final = frozenset({"sig", "jwt-svid"})
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    ("grpc.use_local_subchannel_pool", 1),
)


class SpiffeBundle:
    """The JWT bundle of one trust domain.

    Each time the first answer of a new stream is taken: of a stream that stays open and
    silent it can not be told whether nothing changed or nobody is there any more.
    """

    def __init__(self, address: str, *, trust_domain: str) -> None:
        """``address`` is unix:///PATH, ``trust_domain`` spiffe://NAME."""
        self._address = address
        self._trust_domain = trust_domain
        self._read: tuple[bytes, Mapping[str, IssuerKey]] | None = None

    @property
    def place(self) -> str:
        """Socket and trust domain."""
        return f"{self._trust_domain} of {self._address}"

    async def fetch(self) -> Mapping[str, IssuerKey]:
        """What the agent holds now. Raises KeySourceError."""
        data = _bundle(await self._first_answer(), self._trust_domain)
        if data is None:
            raise fault_of(self.place, "is of a trust domain that the agent does not know")
        if self._read is None or self._read[0] != data:
            try:
                self._read = data, parse_jwks(data, strict=False, uses=_USES)
            except JwksError as error:
                raise fault_of(self.place, str(error)) from None
        return self._read[1]

    async def close(self) -> None:
        """Nothing is open."""

    async def _first_answer(self) -> JWTBundlesResponse:
        try:
            async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
                stream = SpiffeWorkloadAPIStub(channel).FetchJWTBundles(
                    JWTBundlesRequest(), timeout=CALL_SECONDS, metadata=_METADATA
                )
                async for answer in stream:
                    return answer
        except grpc.RpcError as error:
            # The text of the error may hold what the agent says of its callers.
            raise fault_of(self.place, f"can not be fetched: {error.code().name}") from None
        raise fault_of(self.place, "can not be fetched: the agent hung up")


def _bundle(answer: JWTBundlesResponse, trust_domain: str) -> bytes | None:
    """Agents write a trust domain with its scheme or without."""
    for name in (trust_domain, trust_domain.removeprefix(SCHEME)):
        if name in answer.bundles:
            return answer.bundles[name]
    return None
