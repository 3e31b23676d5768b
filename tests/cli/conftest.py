from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdp.policy.bundle import load_bundle
from tests.policy.analysis.small import changed

BuildSmall = Callable[..., Path]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuildSmall]:
    """Write a directory with the starter policy, as Wasm too, and the small data, of
    which a function may change a copy.
    """
    # Imported now: wasmtime's handler of signals has to come after pytest's faulthandler,
    # which is set after conftests are imported, or a trap ends the whole run.
    from pdp.policy.wasm import WasmEvaluator  # noqa: PLC0415

    starter = load_bundle(Path(__file__).parents[2] / "policies" / "bundle.tar.gz")

    def build(change: Any = lambda data: None) -> Path:
        folder = tmp_path_factory.mktemp("bundle")
        bundle = changed(starter, change)
        (folder / "data.json").write_bytes(bundle.data)
        assert bundle.wasm is not None
        (folder / "policy.wasm").write_bytes(bundle.wasm)
        (folder / ".manifest").write_text(json.dumps({"revision": "small", "rego_version": 1}))
        for name, text in bundle.rego.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return folder

    # While one evaluator is open, others of the same Wasm need not compile it.
    with WasmEvaluator(starter):
        yield build
