"""Who takes part in tests of delegation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pdp.testing import TokenIssuer

BUNDLE: Final = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
IDP: Final = TokenIssuer()
MAX_DEPTH: Final = 5
"""Agents that act one for another at the sidecar that tests share."""
