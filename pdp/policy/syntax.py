"""Which rules a module has, read off the syntax tree that OPA makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from pdp.canonical import JsonValue


def rule_paths(module: JsonValue) -> Iterator[tuple[str, ...]]:
    """The path of every rule below ``data``: that of its package, then its own up to where
    a variable stands. Functions are none.

    Raises KeyError, TypeError and the like for what is no syntax tree.
    """
    tree: Any = module
    package = [part["value"] for part in tree["package"]["path"][1:]]
    for rule in tree.get("rules", ()):
        head = rule["head"]
        if "args" in head:
            continue
        first, *more = head["ref"]
        fixed = itertools.takewhile(lambda part: part["type"] == "string", more)
        yield (*package, first["value"], *(part["value"] for part in fixed))
