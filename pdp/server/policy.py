"""Load the policy, from a module that imports nothing else of the server."""

from __future__ import annotations

from pdp.config import Policy
from pdp.policy.bundle import load_bundle
from pdp.policy.wasm import WasmEngine


def load_policy(policy: Policy) -> WasmEngine:
    """The engine that the configuration describes, ready to evaluate. Raises BundleError."""
    assert policy.bundle is not None  # noqa: S101 - until several bundles can be loaded
    return WasmEngine(
        load_bundle(policy.bundle),
        deadline_ms=policy.evaluation_timeout_ms,
        workers=policy.workers,
        memory_max_mib=policy.max_memory_mib,
    )
