"""uri.*, as Go 1.26's ``net/url`` reads addresses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from ipaddress import AddressValueError, IPv6Address
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from pdp.policy.builtins.faults import BuiltinError, UndefinedError
from pdp.policy.builtins.operands import string
from pdp.policy.builtins.values import Object, Value

_BAD_ESCAPE: Final = re.compile("%(?![0-9A-Fa-f]{2})")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f]")
_SCHEME: Final = re.compile("([A-Za-z][A-Za-z0-9+.-]*):")
_USER: Final = re.compile(r"[A-Za-z0-9._:~!$&'()*+,;=%@-]*")
_PORT: Final = re.compile("(?::[0-9]*)?")
_HOST: Final = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=:\[\]<>\"-]|[^\x00-\x7f]|%25|%[89A-Fa-f][0-9A-Fa-f])*"
)
"""Only what is not ASCII may be escaped in a host."""
_ZONE: Final = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=:\[\]<>\"-]|[^\x00-\x7f]"
    r"|%25|%20|%2[124-9A-E]|%3[0-9A-Ea-e]|%[46][1-9A-Fa-f]|%[57][0-9Aa]|%5[BDFbdf]|%7[Ee])*"
)
_UNESCAPED_IN_PATHS: Final = "$&+,/:;=@~"


def is_valid(address: Value) -> Value:
    """uri.is_valid."""
    if not isinstance(address, str) or not address:
        return False
    try:
        _parsed(address)
    except UndefinedError:
        return False
    return True


def parse(address: Value) -> Value:
    """uri.parse: those parts that there are."""
    parts = {name: _unicode(part) for name, part in _parsed(string(address)).items()}
    return Object((name, part) for name, part in parts.items() if part)


def _parsed(address: str) -> dict[str, bytes]:
    """Its parts, unescaped. Raises UndefinedError where it is none."""
    reference, _, fragment = address.partition("#")
    if _CONTROL.search(reference) or reference.startswith(":"):
        raise UndefinedError
    parts = {"fragment": _unescaped(fragment)}
    if reference == "*":
        return parts | {"path": b"*", "raw_path": b"*"}
    found = _SCHEME.match(reference)
    scheme = found[1].lower() if found else ""
    rest, _, query = reference[found.end() if found else 0 :].partition("?")
    parts |= {"scheme": scheme.encode(), "raw_query": query.encode()}
    if not rest.startswith("/"):
        if scheme:
            return parts
        if ":" in rest.partition("/")[0]:
            raise UndefinedError
    if rest.startswith("//") and (scheme or not rest.startswith("///")):
        authority, slash, below = rest[2:].partition("/")
        rest = slash + below
        host, port = _host_and_port(scheme, authority)
        parts |= {"hostname": host, "port": port.encode()}
    path = _unescaped(rest)
    # What is escaped no more than it has to be is given unescaped here too.
    is_plain = quote(path, safe=_UNESCAPED_IN_PATHS) == rest
    return parts | {"path": path, "raw_path": path if is_plain else rest.encode()}


def _host_and_port(scheme: str, authority: str) -> tuple[bytes, str]:
    user, at, location = authority.rpartition("@")
    if at and (not _USER.fullmatch(user) or _BAD_ESCAPE.search(user)):
        raise UndefinedError
    if "[" in location:
        return _literal_and_port(location)
    first, last = location.find(":"), location.rfind(":")
    if first < 0:
        return _host(location), ""
    # Several ports, as databases have them: only the last is looked at.
    colon = first if scheme in ("http", "https") else last
    if not _PORT.fullmatch(location[colon:]):
        raise UndefinedError
    return _host(location[:last]), location[last + 1 :]


def _host(text: str) -> bytes:
    if not _HOST.fullmatch(text):
        raise UndefinedError
    return unquote_to_bytes(text)


def _literal_and_port(location: str) -> tuple[bytes, str]:
    """Of an IPv6 address in brackets."""
    inner, bracket, port = location[1:].rpartition("]")
    if location.rfind("[") > 0 or not bracket or not _PORT.fullmatch(port):
        raise UndefinedError
    address, percent, zone = inner.partition("%25")
    if not _HOST.fullmatch(address) or not _ZONE.fullmatch(percent + zone):
        raise UndefinedError
    literal = _unicode(unquote_to_bytes(inner))
    try:
        IPv6Address(literal)
    except AddressValueError:
        raise UndefinedError from None
    return literal.encode(), port[1:]


def _unescaped(text: str) -> bytes:
    if _BAD_ESCAPE.search(text):
        raise UndefinedError
    return unquote_to_bytes(text)


def _unicode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BuiltinError("a string is not UTF-8") from None


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "uri.is_valid": is_valid,
    "uri.parse": parse,
}
