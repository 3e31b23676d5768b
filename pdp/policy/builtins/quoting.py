"""Strings quoted as Go's strconv.Quote does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_ESCAPES: Final[Mapping[str, str]] = {
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    "\\": "\\\\",
}
_LAST_BYTE_ESCAPE: Final = 0x7F
_FIRST_LONG: Final = 0x10000


def quote(text: str, *, ascii_only: bool = False) -> str:
    """A string in double quotes; what can not be printed is escaped."""
    is_plain = text.isprintable() and (text.isascii() or not ascii_only)
    if is_plain and '"' not in text and "\\" not in text:
        return f'"{text}"'
    escaped = "".join(_escaped(one, '"', ascii_only=ascii_only) for one in text)
    return f'"{escaped}"'


def quote_rune(rune: str, *, ascii_only: bool) -> str:
    """A character in single quotes."""
    escaped = _escaped(rune, "'", ascii_only=ascii_only)
    return f"'{escaped}'"


def _escaped(rune: str, quotation_mark: str, *, ascii_only: bool) -> str:
    if rune == quotation_mark:
        return f"\\{rune}"
    if rune in _ESCAPES:
        return _ESCAPES[rune]
    if rune.isprintable() and (rune.isascii() or not ascii_only):
        return rune
    point = ord(rune)
    if point < ord(" ") or point == _LAST_BYTE_ESCAPE:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < _FIRST_LONG else f"\\U{point:08x}"
