"""JSON as runtime, sidecar and tool server must read it alike (pdp.canonical)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import rfc8785

from pdp.canonical import JsonError, JsonValue, canonical_bytes, parse, sha256_hex
from tests.fuzz.choices import Choices, edited
from tests.fuzz.contract import refuses

MAX_BYTES = 1024 * 1024
SAMPLE: JsonValue = {
    "order_id": "918",
    "n": [0, -1, 0.5, 1e-7, 9007199254740991],
    "\u20ac": {"\ufb33": None, "\U0001f600": True, "\r": False},
}


def samples() -> Iterable[bytes]:
    for text in ('{"a":[1,0.5,"\\u20ac",null,true]}', '{"b":-0.0,"a":1E20}', '"\\ud83d\\ude00"'):
        yield b"\0" + text.encode()
    yield b"\1"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    if choices.yes():
        content = json.dumps(edited(SAMPLE, choices)).encode("utf-8", "surrogatepass")
    else:
        content = choices.rest()
    value = refuses(lambda: [parse(content, max_bytes=MAX_BYTES)], JsonError)
    if value is None:
        return False
    read = value[0]
    # Any other parser reads the same.
    assert _same(json.loads(content), read)
    canonical = canonical_bytes(read)
    assert canonical == rfc8785.dumps(read)
    # Some floats become integers that none reads back, in RFC 8785 itself.
    if refuses(lambda: [parse(canonical, max_bytes=2 * MAX_BYTES)], JsonError) is not None:
        again = parse(canonical, max_bytes=2 * MAX_BYTES)
        assert again == read
        assert canonical_bytes(again) == canonical
        assert sha256_hex(again) == sha256_hex(read)
    return True


def _same(one: JsonValue, other: JsonValue) -> bool:
    """To the type: True is not 1, and 1.0 is not 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return one == other
