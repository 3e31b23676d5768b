"""A guarded runtime, a real sidecar, and tools in an MCP server of a process of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.shared.exceptions import MCPError

from pdp.client import AsyncGuard, current_permit
from pdp.testing import SidecarProcess, TokenIssuer

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "policies" / "bundle.tar.gz"


@pytest.fixture(scope="module")
def idp() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture(scope="module")
def sidecar(idp: TokenIssuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with SidecarProcess(tmp_path_factory.mktemp("mcp"), issuer=idp, bundle=BUNDLE) as running:
        yield running


def refusal(error: MCPError) -> str:
    reason: str = error.error.data["reason_code"]
    return reason


@pytest.mark.parametrize("kind", ("sdk", "fastmcp"))
def test_a_permit_goes_along_with_a_call_to_another_process_and_counts_there_once(
    kind: str, idp: TokenIssuer, sidecar: SidecarProcess
) -> None:
    shop = StdioServerParameters(
        command=sys.executable,
        args=["-m", "tests.e2e.mcp_shop", kind, sidecar.target],
        cwd=ROOT,
    )
    seen: list[str] = []

    async def call(client: Client, meta: dict[str, str], order_id: str = "918") -> str:
        arguments = {"order_id": order_id, "status": "shipped"}
        given: Any = meta
        try:
            result = await client.call_tool("orders.update", arguments, meta=given)
        except MCPError as error:
            return refusal(error)
        content: Any = result.content[0]
        return str(content.text)

    async def work() -> list[str]:
        async with AsyncGuard(sidecar.target, audience="orders") as guard, Client(shop) as client:

            @guard.tool("orders.update")
            async def update(order_id: str, status: str) -> list[str]:
                meta = {"agent-pdp/permit": current_permit().token}
                seen.append(meta["agent-pdp/permit"])
                return [
                    await call(client, {}),
                    await call(client, meta, order_id="919"),
                    await call(client, meta),
                    await call(client, meta),
                ]

            told: list[str] = []
            for tenant in ("tenant_acme", "tenant_globex"):
                token = idp.token(
                    tenant, "user-7", roles=["support_agent"], scopes=["orders:write"]
                )
                with guard.acting_for(token):
                    told += await update("918", status="shipped")
            return told

    assert asyncio.run(work()) == [
        "permit_missing",
        "permit_mismatch",
        "918 of tenant_acme is shipped",
        "permit_used",
        "permit_missing",
        "permit_mismatch",
        "918 of tenant_globex is shipped",
        "permit_used",
    ]
    assert all(token not in sidecar.log.read_text(encoding="utf-8") for token in seen)
