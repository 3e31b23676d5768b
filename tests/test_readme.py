"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdp.config import load_config
from pdp.permit import PermitError
from pdp.testing import SidecarProcess, TokenIssuer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def idp() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture(scope="module")
def sidecar(idp: TokenIssuer) -> Iterator[SidecarProcess]:
    with (
        tempfile.TemporaryDirectory() as directory,
        SidecarProcess(
            Path(directory), issuer=idp, bundle=ROOT / "policies" / "bundle.tar.gz"
        ) as running,
    ):
        yield running


def test_every_link_leads_somewhere() -> None:
    for page in (
        README,
        (ROOT / "CONTRIBUTING.md").read_text(),
        (ROOT / "SECURITY.md").read_text(),
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (ROOT / target).exists(), target


def test_every_make_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_the_configuration_is_accepted(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    file = tmp_path / "pdp.yaml"
    file.write_text(text)
    load_config(file, {})


def test_the_rego_is_that_of_the_starter_bundle() -> None:
    (text,) = blocks("rego")
    assert text in (ROOT / "policies" / "pdp" / "authz" / "authz.rego").read_text()


def test_the_python_runs_from_the_token_to_the_tool(
    idp: TokenIssuer, sidecar: SidecarProcess
) -> None:
    runtime, tool_server = (
        block.replace("unix:///run/pdp/pdp.sock", sidecar.target) for block in blocks("python")
    )
    touched: list[str] = []

    def serve(order_id: str, status: str, permit: str) -> dict[str, str]:
        databases = {"tenant_acme": "acme.db", "tenant_globex": "globex.db"}
        scope: dict[str, Any] = {"token": permit, "databases": databases}
        exec(tool_server, scope)  # noqa: S102 - the README's own code
        touched.append(scope["database"])
        with pytest.raises(PermitError) as caught:
            exec(tool_server, {"token": permit, "databases": databases})  # noqa: S102 - as above
        assert caught.value.reason_code == "permit_used"
        return {"id": order_id, "status": status}

    token = idp.token("tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:write"])
    exec(runtime, {"token": token, "orders_api": SimpleNamespace(update=serve)})  # noqa: S102 - as above
    assert touched == ["acme.db"]
