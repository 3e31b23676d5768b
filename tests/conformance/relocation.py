"""Moves a policy below a place of its own, so that many can be compiled as one."""

from __future__ import annotations

import re
from typing import Final

_TOKEN: Final = re.compile(
    r"""
      (?P<comment> \#[^\n]* )
    | (?P<template> \$["`] )
    | (?P<string> "(?:\\.|[^"\\])*" | `[^`]*` )
    | (?P<name> [A-Za-z_]\w* )
    | (?P<space> \s+ )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)


def moved(rego: str, place: str) -> str:
    """The same Rego with ``data.PLACE`` for its ``data``, packages included."""
    parts: list[str] = []
    _move_code(rego, 0, place, parts, within_template=False)
    return "".join(parts)


def _move_code(rego: str, at: int, place: str, parts: list[str], *, within_template: bool) -> int:
    """Move up to the end, or to the brace that closes an expression in a template string."""
    before = last = ""
    depth = 0
    while at < len(rego):
        found = _TOKEN.match(rego, at)
        assert found is not None
        kind, token, at = found.lastgroup, found.group(), found.end()
        if kind == "template":
            parts.append(token)
            at = _move_template(rego, at, place, parts, closing=token[1])
        elif kind == "name" and token == "data" and last != ".":
            parts.append(f"data.{place}")
        elif kind == "name" and last == "package" and before != ".":
            parts.append(f"{place}.{token}")
        else:
            parts.append(token)
        if within_template and token in {"{", "}"}:
            depth += 1 if token == "{" else -1
            if depth < 0:
                return at
        if kind not in {"space", "comment"}:
            before, last = last, token
    return at


def _move_template(rego: str, at: int, place: str, parts: list[str], *, closing: str) -> int:
    while True:
        token = rego[at : at + 2] if rego[at] == "\\" else rego[at]
        at += len(token)
        parts.append(token)
        if token == closing:
            return at
        if token == "{":
            at = _move_code(rego, at, place, parts, within_template=True)
