"""For tests and demonstrations: an issuer of tokens, and a real sidecar process."""

from __future__ import annotations

from pdp.testing.issuer import TokenIssuer
from pdp.testing.sidecar import SidecarProcess

__all__ = ["SidecarProcess", "TokenIssuer"]
