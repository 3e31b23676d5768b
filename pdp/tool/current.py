"""The permit of the call that a tool server is serving."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from pdp.permit import Permit

_permit: contextvars.ContextVar[Permit] = contextvars.ContextVar("permit")


def current_permit() -> Permit:
    """The verified permit of the call that is being served. Raises LookupError elsewhere."""
    return _permit.get()


@contextlib.contextmanager
def serving(permit: Permit) -> Iterator[None]:
    """Make it the current permit for what runs inside."""
    token = _permit.set(permit)
    try:
        yield
    finally:
        _permit.reset(token)
