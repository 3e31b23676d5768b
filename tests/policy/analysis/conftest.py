from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdp.policy.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(starter: Bundle) -> Iterator[None]:
    """While one evaluator is open, others of the same Wasm need not compile it."""
    # Imported now: wasmtime's handler of signals has to come after pytest's faulthandler,
    # which is set after conftests are imported, or a trap ends the whole run.
    from pdp.policy.wasm import WasmEvaluator  # noqa: PLC0415

    with WasmEvaluator(starter):
        yield
