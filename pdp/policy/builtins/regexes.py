"""regex.*: RE2, by Google's own library, so that no pattern can run long."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Final

import re2  # type: ignore[import-untyped]  # it has no types

from pdp.policy.builtins.faults import UndefinedError, too_large
from pdp.policy.builtins.operands import int64, string
from pdp.policy.builtins.values import MAX_RESULT_BYTES, Value

MAX_PATTERN_BYTES: Final = 4_096
MAX_REFERENCES: Final = 200
"""In what takes the place of a match."""
MAX_STEPS: Final = 50_000_000
"""Of all searches of a call: bytes that each may look at, times the size of the compiled
pattern. RE2 is never slower than that, and mostly much faster."""
_MAX_COMPILED_BYTES: Final = 1024 * 1024


def split(pattern: Value, text: Value) -> Value:
    """regex.split."""
    subject = string(text).encode()
    compiled = _compiled(string(pattern))
    # As Go: no empty part where an empty match stands at the beginning or at the end.
    if string(pattern) and not subject:
        return ("",)
    parts: list[Value] = []
    begin, end = 0, 0
    for found in _matches(compiled, subject):
        end = found.start()
        if found.end():
            parts.append(subject[begin:end].decode())
        begin = found.end()
    if end != len(subject):
        parts.append(subject[begin:].decode())
    return tuple(parts)


def find_n(pattern: Value, text: Value, limit: Value) -> Value:
    """regex.find_n."""
    subject = string(text).encode()
    most = int64(limit)
    compiled = _compiled(string(pattern))
    found: list[Value] = []
    for one in _matches(compiled, subject):
        if most >= 0 and len(found) >= most:
            break
        found.append(one.group().decode())
    return tuple(found)


def replace(text: Value, pattern: Value, template: Value) -> Value:
    """regex.replace."""
    subject = string(text).encode()
    replacement = _template(string(template))
    compiled = _compiled(string(pattern))
    groups: Mapping[bytes, int] = compiled.groupindex
    parts: list[bytes] = []
    length, end = 0, 0
    for found in _matches(compiled, subject):
        written = [subject[end : found.start()], *_expanded(replacement, found, groups)]
        length += sum(map(len, written))
        if length > MAX_RESULT_BYTES:
            raise too_large("a string")
        parts += written
        end = found.end()
    return b"".join((*parts, subject[end:])).decode()


def template_match(template: Value, text: Value, start: Value, end: Value) -> Value:
    """regex.template_match: a regular expression stands between delimiters only."""
    first, last = string(start), string(end)
    pattern, subject = string(template), string(text).encode()
    if len(first.encode()) != 1 or len(last.encode()) != 1:
        raise UndefinedError
    parts = ["^"]
    done = 0
    for opened, closed in _delimited(pattern, first, last):
        inner = pattern[opened + 1 : closed]
        # Alone it must be a pattern too: "a)(b" is none.
        _compiled(f"^{inner}$")
        parts.append(f"{re2.escape(pattern[done:opened])}({inner})")
        done = closed + 1
    parts.append(f"{re2.escape(pattern[done:])}$")
    compiled = _compiled("".join(parts))
    if len(subject) * compiled.programsize > MAX_STEPS:
        raise too_large("a search")
    return compiled.search(subject) is not None


def _compiled(pattern: str) -> re2._Regexp:
    """A compiled pattern. Raises UndefinedError where it is none."""
    if len(pattern.encode()) > MAX_PATTERN_BYTES:
        raise too_large("a pattern")
    return _compile(pattern)


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re2._Regexp:
    if _ANY_BYTE.search(pattern):
        raise UndefinedError
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_COMPILED_BYTES
    try:
        return re2.compile(pattern.encode(), options)
    except re2.error:
        raise UndefinedError from None


def _matches(compiled: re2._Regexp, subject: bytes) -> Iterator[re2._Match]:
    """All matches, as Go finds them: none that is empty right behind another one."""
    at, previous, steps = 0, -1, 0
    while at <= len(subject):
        steps += (len(subject) - at + 1) * compiled.programsize
        if steps > MAX_STEPS:
            raise too_large("a search")
        found = compiled.search(subject, at)
        if found is None:
            return
        is_empty = found.end() == found.start()
        if not is_empty or found.start() != previous:
            yield found
        previous = found.end()
        at = previous + (_width(subject, previous) if is_empty else 0)


def _width(subject: bytes, at: int) -> int:
    """How many bytes the character there has."""
    end = at + 1
    while end < len(subject) and subject[end] & 0xC0 == 0x80:  # noqa: PLR2004 - a following byte
        end += 1
    return end - at


_ANY_BYTE: Final = re.compile(r"(?<!\\)(?:\\\\)*\\C")
"""The one thing that this library takes and Go's does not."""
_REFERENCE: Final = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})")


_NUMBER: Final = re.compile(b"0|[1-9][0-9]{0,7}")


def _template(text: str) -> list[tuple[bytes, bool]]:
    """Its parts: the literal ones and, true, the names of groups. As Go's Expand."""
    parts: list[tuple[bytes, bool]] = []
    end = 0
    for found in _REFERENCE.finditer(text):
        parts.append((text[end : found.start()].encode(), False))
        name = found[2] or found[3]
        parts.append((name.encode(), True) if name else (b"$", False))
        end = found.end()
    parts.append((text[end:].encode(), False))
    if len(parts) > 2 * MAX_REFERENCES + 1:
        raise too_large("a replacement")
    return parts


def _expanded(
    template: list[tuple[bytes, bool]], found: re2._Match, groups: Mapping[bytes, int]
) -> Iterator[bytes]:
    for part, is_group in template:
        if not is_group:
            yield part
            continue
        number = int(part) if _NUMBER.fullmatch(part) else groups.get(part)
        if number is not None and number <= found.re.groups:
            yield found.group(number) or b""


def _delimited(text: str, first: str, last: str) -> Iterator[tuple[int, int]]:
    """Where the outermost delimiters stand. Raises UndefinedError where they do not match."""
    depth, opened = 0, 0
    for at, character in enumerate(text):
        if character == first:
            depth += 1
            if depth == 1:
                opened = at
        elif character == last:
            depth -= 1
            if depth == 0:
                yield opened, at
            elif depth < 0:
                raise UndefinedError
    if depth:
        raise UndefinedError


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "regex.find_n": find_n,
    "regex.replace": replace,
    "regex.split": split,
    "regex.template_match": template_match,
}
