"""A policy decision point beside every agent runtime.

What a runtime imports is :mod:`pdp.client`; what a tool server imports is
:mod:`pdp.permit`. The sidecar itself is the command ``pdp serve``.
"""

from __future__ import annotations

__version__ = "0.1.0"
