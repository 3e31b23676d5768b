"""The one root of every error that this package raises on purpose."""

from __future__ import annotations

from collections.abc import Callable

from pdp.reason import ReasonCode


class PdpError(Exception):
    """Something was refused or failed, for a reason that has a code.

    ``message`` is a fixed text that is safe to show to the caller: it says what
    to do next and never holds a token, a permit, an argument or another
    tenant's data. Detail that helps an operator goes to the log.
    """

    def __init__(self, reason_code: str, message: str) -> None:
        super().__init__(message)
        self.reason_code = str(reason_code)
        self.message = message

    def __reduce__(
        self,
    ) -> tuple[Callable[..., PdpError], tuple[type[PdpError], dict[str, object]]]:
        # A pool of processes pickles what a worker raises; subclasses take other arguments.
        return _restored, (type(self), self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reason_code={self.reason_code!r})"


class RequestError(PdpError):
    """A field of a request is missing, malformed or out of bounds."""

    def __init__(
        self, field: str, description: str, *, reason_code: str = ReasonCode.REQUEST_INVALID
    ) -> None:
        super().__init__(reason_code, f"{field} {description}")
        self.field = field
        self.description = description


class FetchError(PdpError):
    """What lies elsewhere can not be had now. The message names the place and what to do;
    it is for operators and holds no credential.
    """

    status: int | None = None
    """What a server answered instead, where that is why."""
    retry_after_seconds: float | None = None
    """How long the server asks to be left alone."""


def _restored(kind: type[PdpError], state: dict[str, object]) -> PdpError:
    error = kind.__new__(kind, state["message"])
    error.__dict__.update(state)
    return error
