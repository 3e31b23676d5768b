"""How a built-in ends without a value."""

from __future__ import annotations


class BuiltinError(Exception):
    """A fault that ends the evaluation. Its text quotes no value."""


class UndefinedError(Exception):
    """OPA calls this a built-in error: without strict mode the expression is undefined."""


def too_large(what: str) -> BuiltinError:
    """The fault of one who asks for more than the host gives."""
    return BuiltinError(f"{what} is larger than the host allows")
