"""What importing brings, what a fork keeps, and what the stub needs installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pdp.client import Guard, PermitDenied, current_permit
from pdp.testing import SidecarProcess

ROOT = Path(__file__).parents[2]

SERVER_ONLY = [
    "pdp.audit",
    "pdp.budget",
    "pdp.cli",
    "pdp.config",
    "pdp.decision",
    "pdp.identity",
    "pdp.policy",
    "pdp.server",
    "apsw",
    "joserfc",
    "msgspec",
    "opa_wasm",
    "prometheus_client",
    "rich",
    "typer",
    "uvloop",
    "wasmtime",
    "yaml",
]

USE = """
import asyncio, json, sys
from pdp.client import AsyncGuard, Guard, PermitDenied, current_permit
from pdp.permit import PermitRedeemer, PermitVerifier

target, token = sys.argv[1:]
arguments = {"order_id": "918"}
guard = Guard(target)

@guard.tool("orders.read")
def read_order(order_id: str) -> str:
    permit = current_permit()
    with PermitRedeemer(target) as redeemer:
        verifier = PermitVerifier(redeemer.keys(), issuer="agent-pdp", audience="tools")
        redeemer.redeem(verifier.verify(permit.token, tool="orders.read", arguments=arguments))
    return permit.tenant

async_guard = AsyncGuard(target)

@async_guard.tool("orders.read")
async def read_order_async(order_id: str) -> str:
    return current_permit().tenant

async def run() -> str:
    with async_guard.acting_for(token):
        return await read_order_async("918")

with guard.acting_for(token):
    found = [read_order("918"), asyncio.run(run())]
try:
    read_order("918")
except PermitDenied as denied:
    found.append(denied.reason_code)
print(json.dumps({"found": found, "from": sys.modules["pdp"].__file__}))
"""


def modules_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def server_modules(modules: set[str]) -> set[str]:
    return {name for name in modules if any(f"{name}.".startswith(f"{s}.") for s in SERVER_ONLY)}


@pytest.mark.parametrize("package", ("pdp.client", "pdp.permit"))
def test_importing_brings_nothing_of_the_server_and_no_grpc(package: str) -> None:
    modules = modules_after(f"import {package}")
    assert server_modules(modules) == set()
    assert modules.isdisjoint({"grpc", "asyncio"})


def in_a_child(work: Callable[[], str]) -> str:
    """What ``work`` says in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as found:
        said = found.read()
    os.waitpid(child, 0)
    return said


def test_a_child_of_a_fork_asks_by_itself(guard: Guard, token: str) -> None:
    @guard.tool("orders.read")
    def read_order(order_id: str) -> str:
        return current_permit().id

    with guard.acting_for(token):
        before = read_order("918")  # the connection is open before the fork
        in_child = in_a_child(lambda: read_order("918"))
        after = read_order("918")
    assert len({before, in_child, after}) == 3
    assert len(in_child) == 36


def test_a_child_of_a_fork_is_blocked_like_its_parent(guard: Guard, token: str) -> None:
    @guard.tool("orders.delete")
    def delete_order(order_id: str) -> str:
        return "ran"

    def attempt() -> str:
        try:
            return delete_order("918")
        except PermitDenied as denied:
            return denied.reason_code

    with guard.acting_for(token):
        assert attempt() == in_a_child(attempt) == "tool_not_allowed"


@pytest.mark.slow
def test_the_stub_works_with_only_the_base_dependencies(
    sidecar: SidecarProcess, token: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("base")
    python = directory / "venv" / "bin" / "python"
    wheels = directory / "wheels"
    quiet = ["--disable-pip-version-check", "--quiet"]
    build: list[str | Path] = ["--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT]
    base: list[str | Path] = [
        "--require-hashes",
        "--requirement",
        ROOT / "requirements" / "base.txt",
    ]
    product: list[str | Path] = ["--no-deps", "--no-index", "--find-links", wheels, "agent-pdp"]
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-m", "venv", directory / "venv"],
        [sys.executable, "-m", "pip", *quiet, "wheel", *build],  # with its own hatchling
        [python, "-m", "pip", *quiet, "install", *base],
        [python, "-m", "pip", *quiet, "install", *product],
    )
    for command in commands:
        subprocess.run(command, check=True, cwd=directory)
    done = subprocess.run(
        [str(python), "-W", "error", "-c", USE, sidecar.target, token],
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"found": ["tenant_acme", "tenant_acme", "identity_missing"]' in done.stdout
    assert str(ROOT) not in done.stdout
