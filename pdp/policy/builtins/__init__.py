"""Built-ins that the host lends to a policy, each as OPA's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

NAMES: Final[frozenset[str]] = frozenset()
"""OPA compiles most built-ins into the module itself; these it does not."""


class BuiltinError(Exception):
    """A fault that ends the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What stays the same throughout one evaluation."""

    now_ns: int
    """Unix nanoseconds."""


def call(name: str, _arguments: Sequence[bytes], _evaluation: Evaluation) -> bytes | None:
    """The value of a built-in; None is undefined. Raises BuiltinError.

    Arguments and result are values in OPA's own text form.
    """
    raise BuiltinError(f"{name} is not lent")
