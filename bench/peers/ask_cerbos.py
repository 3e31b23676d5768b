"""Cerbos, asked through its own Python SDK."""

from __future__ import annotations

from cerbos.engine.v1 import engine_pb2
from cerbos.sdk.grpc.client import AsyncCerbosClient, CerbosClient
from google.protobuf.struct_pb2 import Value

from bench.peers.question import TOOL, Call


def principal(call: Call) -> engine_pb2.Principal:
    scopes = Value()
    scopes.list_value.extend(call.scopes)
    return engine_pb2.Principal(
        id="alice",
        roles={call.role},
        attr={"tenant": Value(string_value=call.tenant), "scopes": scopes},
    )


def resource(call: Call) -> engine_pb2.Resource:
    return engine_pb2.Resource(
        id=call.order_id,
        kind="orders",
        attr={
            "order_id": Value(string_value=call.order_id),
            "status": Value(string_value=call.status),
        },
    )


class Sync:
    def __init__(self, target: str) -> None:
        self._client = CerbosClient(target, tls_verify=False)

    def ask(self, call: Call) -> bool:
        return bool(self._client.is_allowed(TOOL, principal(call), resource(call)))


class Async:
    def __init__(self, target: str) -> None:
        self._client = AsyncCerbosClient(target, tls_verify=False)

    async def ask(self, call: Call) -> bool:
        return bool(await self._client.is_allowed(TOOL, principal(call), resource(call)))
