"""How a refusal looks over HTTP, and in JSON-RPC after its example."""

from __future__ import annotations

from typing import Final

from pdp.errors import PdpError
from pdp.reason import ReasonCode

_STATUS: Final[dict[str, int]] = {
    ReasonCode.PERMIT_MISSING: 401,
    ReasonCode.PERMIT_INVALID: 401,
    ReasonCode.PERMIT_UNAVAILABLE: 503,
    ReasonCode.PDP_UNAVAILABLE: 503,
    ReasonCode.REQUEST_INVALID: 400,
    ReasonCode.ARGUMENTS_INVALID: 400,
}
"""Everything else is 403."""


def status_of(error: PdpError) -> int:
    """The HTTP status that says so."""
    return _STATUS.get(error.reason_code, 403)
