"""hex.*, base64url.encode_no_pad, urlquery.*, json.marshal_with_options and uuid.parse."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final
from urllib.parse import quote_plus, unquote_to_bytes
from uuid import UUID

from pdp.policy.builtins.faults import BuiltinError, UndefinedError, too_large
from pdp.policy.builtins.operands import an_object, string
from pdp.policy.builtins.values import (
    MAX_RESULT_BYTES,
    Object,
    Value,
    in_order,
    number,
    text_of,
)

MAX_QUERY_PARAMETERS: Final = 10_000
"""As Go has it."""
_HEX: Final = re.compile("(?:[0-9A-Fa-f]{2})*")
_BAD_ESCAPE: Final = re.compile("%(?![0-9A-Fa-f]{2})")


def base64url_encode_no_pad(text: Value) -> Value:
    """base64url.encode_no_pad."""
    return base64.urlsafe_b64encode(string(text).encode()).decode().rstrip("=")


def hex_encode(text: Value) -> Value:
    """hex.encode."""
    return string(text).encode().hex()


def hex_decode(text: Value) -> Value:
    """hex.decode."""
    digits = string(text)
    if not _HEX.fullmatch(digits):
        raise UndefinedError
    return _unicode(bytes.fromhex(digits))


def query_encode(text: Value) -> Value:
    """urlquery.encode."""
    return quote_plus(string(text))


def query_decode(text: Value) -> Value:
    """urlquery.decode."""
    return _unescaped(string(text))


def query_encode_object(parameters: Value) -> Value:
    """urlquery.encode_object: sorted by name."""
    pairs = []
    for key, value in an_object(parameters).items():
        name = key if isinstance(key, str) else _json(key)
        values = in_order(value) if isinstance(value, frozenset) else value
        texts = values if isinstance(values, tuple | list) else (values,)
        pairs.append((name.encode(), [(name, string(text)) for text in texts]))
    return "&".join(
        f"{quote_plus(name)}={quote_plus(text)}"
        for _, named in sorted(pairs)
        for name, text in named
    )


def query_decode_object(text: Value) -> Value:
    """urlquery.decode_object: an array of strings for each name."""
    query = string(text)
    if query.count("&") >= MAX_QUERY_PARAMETERS or ";" in query:
        raise UndefinedError
    values: dict[str, list[Value]] = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        values.setdefault(_unescaped(name), []).append(_unescaped(value))
    return Object((name, tuple(found)) for name, found in values.items())


def _unescaped(text: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise UndefinedError
    return _unicode(unquote_to_bytes(text.replace("+", " ")))


def _unicode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BuiltinError("a string is not UTF-8") from None


def marshal_with_options(value: Value, options: Value) -> Value:
    """json.marshal_with_options: over several lines where one of the options is given."""
    given = dict(an_object(options))
    pretty = given.pop("pretty", bool(given))
    prefix, indent = string(given.pop("prefix", "")), string(given.pop("indent", "\t"))
    if given or not isinstance(pretty, bool):
        raise UndefinedError
    if not pretty:
        return _json(value)
    return prefix + _joined(_lines(value, f"\n{prefix}", indent))


def _json(value: Value) -> str:
    return _joined(_lines(value, "", ""))


def _joined(parts: Iterator[str]) -> str:
    kept: list[str] = []
    length = 0
    for part in parts:
        length += len(part)
        if length > MAX_RESULT_BYTES:
            raise too_large("a string")
        kept.append(part)
    return "".join(kept)


def _lines(value: Value, line: str, indent: str) -> Iterator[str]:
    """The parts of a value as Go's encoding/json writes it; ``line`` begins a new line."""
    match value:
        case str():
            yield _json_string(value)
        case Object():
            named = {
                key if isinstance(key, str) else _json(key): item for key, item in value.items()
            }
            colon = ": " if line else ":"
            items = [(f"{_json_string(name)}{colon}", named[name]) for name in sorted(named)]
            yield from _collection("{", items, "}", line, indent)
        case tuple() | frozenset():
            ordered = in_order(value) if isinstance(value, frozenset) else value
            yield from _collection("[", [("", item) for item in ordered], "]", line, indent)
        case _:
            yield text_of(value)


def _collection(
    opening: str, items: list[tuple[str, Value]], closing: str, line: str, indent: str
) -> Iterator[str]:
    if not items:
        yield opening + closing
        return
    inner = line + indent if line else ""
    for index, (name, item) in enumerate(items):
        yield f"{',' if index else opening}{inner}{name}"
        yield from _lines(item, inner, indent)
    yield line + closing


_ESCAPED: Final = re.compile('[\x00-\x1f"\\\\<>&\u2028\u2029]')
_SHORT_ESCAPES: Final[Mapping[str, str]] = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def _json_string(text: str) -> str:
    def escape(found: re.Match[str]) -> str:
        return _SHORT_ESCAPES.get(found.group()) or f"\\u{ord(found.group()):04x}"

    return f'"{_ESCAPED.sub(escape, text)}"'


_DASHED: Final = re.compile("[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
_NODE_KINDS: Final = ("global:unicast", "global:multicast", "local:unicast", "local:multicast")
_DOMAINS: Final = ("Person", "Group", "Org")
_GREGORIAN_TO_UNIX: Final = 0x01B21DD213814000
"""In units of 100 ns."""


def uuid_parse(text: Value) -> Value:
    """uuid.parse: version, variant and, of those made of time and node, what they were."""
    parsed = UUID(_uuid_digits(string(text)))
    version = (parsed.int >> 76) & 0xF
    fields: dict[Value, Value] = {"version": number(version), "variant": _variant(parsed)}
    if version in (1, 2):
        fields |= {
            "time": number(_wrapped((parsed.time - _GREGORIAN_TO_UNIX) * 100)),
            "nodeid": parsed.bytes[10:].hex("-"),
            "macvariables": _NODE_KINDS[parsed.bytes[10] & 0b11],
            "clocksequence": number(int.from_bytes(parsed.bytes[8:10]) & 0x3FFF),
        }
    if version == 2:  # noqa: PLR2004 - DCE security
        domain = parsed.bytes[9]
        name = _DOMAINS[domain] if domain < len(_DOMAINS) else f"Domain{domain}"
        fields |= {"id": number(int.from_bytes(parsed.bytes[:4])), "domain": name}
    return Object(fields.items())


def _wrapped(value: int) -> int:
    """As an int64 of Go overflows."""
    return (value + 2**63) % 2**64 - 2**63


def _uuid_digits(text: str) -> str:
    encoded = text.encode()
    if len(encoded) == 32:  # noqa: PLR2004 - digits of 16 bytes
        digits = text
    else:
        # What stands around it is not looked at, as in Go.
        start = {36: 0, 38: 1, 45: 9}.get(len(encoded))
        if start is None or (start == 9 and text[:9].lower() != "urn:uuid:"):  # noqa: PLR2004
            raise UndefinedError
        dashed = encoded[start : start + 36].decode(errors="replace")
        if not _DASHED.fullmatch(dashed):
            raise UndefinedError
        digits = dashed.replace("-", "")
    if not re.fullmatch("[0-9A-Fa-f]{32}", digits):
        raise UndefinedError
    return digits


def _variant(parsed: UUID) -> str:
    octet = parsed.bytes[8]
    if octet & 0xC0 == 0x80:  # noqa: PLR2004 - bits of RFC 4122
        return "RFC4122"
    if octet & 0xE0 == 0xC0:  # noqa: PLR2004 - same
        return "Microsoft"
    return "Future" if octet & 0xE0 == 0xE0 else "Reserved"  # noqa: PLR2004 - same


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "base64url.encode_no_pad": base64url_encode_no_pad,
    "hex.decode": hex_decode,
    "hex.encode": hex_encode,
    "json.marshal_with_options": marshal_with_options,
    "urlquery.decode": query_decode,
    "urlquery.decode_object": query_decode_object,
    "urlquery.encode": query_encode,
    "urlquery.encode_object": query_encode_object,
    "uuid.parse": uuid_parse,
}
