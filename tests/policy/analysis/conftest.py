from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdp.policy.bundle import Bundle
from pdp.policy.wasm import WasmEvaluator


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(starter: Bundle) -> Iterator[None]:
    """While one evaluator is open, others of the same Wasm need not compile it."""
    with WasmEvaluator(starter):
        yield
