"""The engines that one case is put to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from pdp.policy.bundle import Bundle
from pdp.policy.engine import ActivePolicy
from pdp.policy.live import LivePolicy
from pdp.policy.opa.managed import ManagedOpa
from pdp.policy.opa.process import OpaFolder
from pdp.policy.opa.server import OpaEngine
from pdp.policy.wasm import WasmEngine
from tests.policy.opa.servers import served

ENGINES: Final = ("embedded", "managed", "external")
WORKERS: Final = 2
MEMORY_MAX_MIB: Final = 1_024
"""So much that an endless policy meets its deadline first: it takes some 1 GiB a second."""


@asynccontextmanager
async def active(
    engine: str, bundle: Bundle, opa: Path, *, deadline_ms: int
) -> AsyncIterator[ActivePolicy]:
    """A bundle in force: embedded, in an OPA that is managed, or in one that runs already."""
    if engine == "external":
        async with _external(bundle, opa, deadline_ms) as policy:
            yield policy
        return
    live = LivePolicy(
        await ManagedOpa.start(bundle, opa=opa, deadline_ms=deadline_ms, workers=WORKERS)
        if engine == "managed"
        else WasmEngine(
            bundle, deadline_ms=deadline_ms, workers=WORKERS, memory_max_mib=MEMORY_MAX_MIB
        )
    )
    try:
        yield live
    finally:
        await live.close()


@asynccontextmanager
async def _external(bundle: Bundle, opa: Path, deadline_ms: int) -> AsyncIterator[OpaEngine]:
    folder = OpaFolder(bundle)
    try:
        with served(opa, "--bundle", folder.path / "bundle") as url:
            engine = OpaEngine(url, token_file=None, deadline_ms=deadline_ms)
            try:
                assert await engine.healthy()
                yield engine
            finally:
                await engine.close()
    finally:
        folder.remove()
