"""For tests and demonstrations: tokens, bundles, callers, and a real sidecar process."""

from __future__ import annotations

from pdp.testing.bundle import build_bundle
from pdp.testing.caller import Caller, Refusal, refusal_of
from pdp.testing.issuer import TokenIssuer
from pdp.testing.sidecar import SidecarProcess

__all__ = [
    "Caller",
    "Refusal",
    "SidecarProcess",
    "TokenIssuer",
    "build_bundle",
    "refusal_of",
]
