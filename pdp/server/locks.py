"""One sidecar per socket and per state directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from pdp.errors import PdpError
from pdp.reason import ReasonCode


class StartError(PdpError):
    """The sidecar can not start; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.INTERNAL, message)


class ExclusiveLock:
    """Held by this process until it is released or the process ends, however it
    ends. Raises StartError when another process holds it.
    """

    def __init__(self, path: Path, *, holds: str) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"{holds} can not be used: {path}: {error.strerror}.") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise StartError(
                f"{holds} is in use by another sidecar. Stop that one, or give this one"
                " another in the configuration."
            ) from None

    def release(self) -> None:
        """Let another process have it."""
        os.close(self._descriptor)
