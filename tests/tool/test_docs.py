"""What docs/tool-servers.md and docs/permits.md show, run against a real sidecar."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdp.client import Guard
from pdp.permit import PermitRedeemer, claims
from pdp.reason import ReasonCode
from pdp.testing import SidecarProcess, TokenIssuer
from scripts.generate_permit_vectors import claims as example_claims
from tests.tool.permits import ORDER

DOCS = Path(__file__).resolve().parents[2] / "docs"
BUNDLE = DOCS.parent / "policies" / "bundle.tar.gz"
PERMITS = (DOCS / "permits.md").read_text(encoding="utf-8")


def run(page: Path, names: dict[str, Any], **replaced: str) -> int:
    text = page.read_text(encoding="utf-8")
    for old, new in replaced.items():
        text = text.replace(old, new)
    examples = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    for example in examples:
        # Blank lines before it, so that a failure names the page's own line.
        lines_before = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_before + example[1], page, "exec"), names)  # noqa: S102 - the page's own code
    return len(examples)


@pytest.fixture
def idp() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture
def sidecar(tmp_path: Path, idp: TokenIssuer) -> Iterator[SidecarProcess]:
    with SidecarProcess(tmp_path, issuer=idp, bundle=BUNDLE) as running:
        yield running


def test_every_example_for_tool_servers_runs(
    tmp_path: Path, idp: TokenIssuer, sidecar: SidecarProcess
) -> None:
    token = idp.token("tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:write"])
    with Guard(sidecar.target) as guard, PermitRedeemer(sidecar.target) as redeemer:
        names: dict[str, Any] = {
            "guard": guard,
            "token": token,
            "order": ORDER,
            "once_file": tmp_path / "once.sqlite",
            "jwks": redeemer.keys().to_jwks(),
        }
        replaced = {"unix:///run/pdp/pdp.sock": sidecar.target}
        assert run(DOCS / "tool-servers.md", names, **replaced) >= 11

        # What the page only sets up is asked as well.
        assert asyncio.run(names["ask"](names["fast_shop"]._mcp_server, token)) == (
            "918 of tenant_acme is shipped"
        )
        with guard.acting_for(token):
            permit = guard.authorize("orders.update", ORDER, audience="orders")
        assert asyncio.run(post(names["guarded"], permit.token)) == (200, b"for tenant_acme")
        assert asyncio.run(post(names["guarded"], permit.token))[0] == 403
        names["server"].stop(None)
        names["sidecars"].close()
        names["domain"].close()


async def post(application: Any, permit: str) -> tuple[int, bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(ORDER).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"tool-permit", permit.encode())]
    scope = {"type": "http", "method": "POST", "path": "/orders/update", "headers": headers}
    await application(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def test_every_example_of_the_specification_runs() -> None:
    assert run(DOCS / "permits.md", {}) >= 1
    (shown,) = re.findall(r"```json\n(.*?)```", PERMITS, re.DOTALL)
    assert json.loads(shown) == example_claims()


def test_the_specification_names_every_claim_and_every_code_it_names_exists() -> None:
    named = set(re.findall(r"`(\w+)`", PERMITS))
    for members in (
        claims._CLAIMS | claims._OPTIONAL_CLAIMS,
        claims._DETAIL | claims._OPTIONAL_DETAIL,
        claims._TENANT_CONTEXT | claims._OPTIONAL_TENANT_CONTEXT,
    ):
        assert members <= named
    codes = {name for name in named if name.startswith("permit_")}
    assert codes <= set(ReasonCode)
    assert f"at most {claims.MAX_AGENTS}" in PERMITS
    assert f"1 to {claims.MAX_USES:,}" in PERMITS
    assert f"1 to {claims.MAX_DELEGATIONS} texts" in PERMITS


@pytest.mark.parametrize("page", ("permits.md", "tool-servers.md"))
def test_every_link_leads_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = DOCS / target if target else DOCS / page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
            assert heading in slugs, (page, target, heading)
