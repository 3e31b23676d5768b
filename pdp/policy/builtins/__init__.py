"""Built-ins that the host lends to a policy, each as OPA's own answers.

OPA compiles most built-ins into the module itself; these it does not. A module that
asks for any other (http.send, io.jwt.*, crypto.*, rand.*, ...) is refused when it is
loaded.

The deadline of an evaluation can not interrupt Python. So every built-in is bounded:
by the size of its arguments, and by limits of its own where that is not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pdp.policy.builtins import (
    encodings,
    networks,
    numbers,
    objects,
    patches,
    printf,
    regexes,
    texts,
    times,
    urls,
    versions,
)
from pdp.policy.builtins.faults import BuiltinError, UndefinedError
from pdp.policy.builtins.values import Value, dump, parse

__all__ = ["NAMES", "BuiltinError", "Evaluation", "call"]

_BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    **encodings.BUILTINS,
    **networks.BUILTINS,
    **numbers.BUILTINS,
    **objects.BUILTINS,
    **patches.BUILTINS,
    **printf.BUILTINS,
    **regexes.BUILTINS,
    **texts.BUILTINS,
    **times.BUILTINS,
    **urls.BUILTINS,
    **versions.BUILTINS,
}
MAX_ARGUMENT_BYTES: Final = 256 * 1024
"""Of one call, all arguments together: to read them takes up to 0.3 s."""
_NOW: Final = "time.now_ns"

NAMES: Final[frozenset[str]] = frozenset({_NOW, *_BUILTINS})
"""Those that the host lends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What stays the same throughout one evaluation."""

    now_ns: int
    """Unix nanoseconds."""


def call(name: str, arguments: Sequence[bytes], evaluation: Evaluation) -> bytes | None:
    """The value of a built-in; None is undefined. Raises BuiltinError.

    Arguments and result are values in OPA's own text form.
    """
    if name == _NOW:
        return str(evaluation.now_ns).encode()
    builtin = _BUILTINS.get(name)
    if builtin is None:
        raise BuiltinError(f"{name} is not lent")
    if sum(map(len, arguments)) > MAX_ARGUMENT_BYTES:
        raise BuiltinError(f"{name} was given more than it takes")
    try:
        return dump(builtin(*map(parse, arguments)))
    except UndefinedError:
        return None
    except UnicodeEncodeError:
        raise BuiltinError(f"{name} was given a string that is not UTF-8") from None
    except (RecursionError, MemoryError):
        raise BuiltinError(f"{name} was asked for more than the host gives") from None
