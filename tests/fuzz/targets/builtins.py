"""What a policy has the host compute for it, of whatever a caller has sent (pdp.policy.builtins)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from pdp.policy.builtins import NAMES, BuiltinError, Evaluation, call
from pdp.policy.builtins.values import MAX_RESULT_BYTES, dump, parse
from tests.fuzz.choices import Choices, edited_bytes
from tests.fuzz.contract import SECRET, refuses

EVALUATION: Final = Evaluation(now_ns=1_800_000_000_123_456_789)
USUAL: Final[Mapping[str, Sequence[str]]] = {
    "base64url.encode_no_pad": ['"a?b"'],
    "glob.quote_meta": ['"a*b?"'],
    "graph.reachable_paths": ['{"a": ["b"], "b": ["a", "c"], "c": []}', '["a"]'],
    "hex.decode": ['"68690a"'],
    "hex.encode": ['"hi"'],
    "indexof_n": ['"banana"', '"an"'],
    "json.marshal_with_options": ['{"a": [1, {"b": null}]}', '{"indent": "  ", "prefix": ">"}'],
    "json.patch": ['{"a": [1, 2]}', '[{"op": "add", "path": "/a/-", "value": 3}]'],
    "net.cidr_contains_matches": ['["10.0.0.0/8", "::/0"]', '{"a": "10.1.2.3"}'],
    "net.cidr_expand": ['"10.0.0.0/29"'],
    "net.cidr_is_valid": ['"10.0.0.0/8"'],
    "net.cidr_merge": ['["10.0.0.0/9", "10.128.0.0/9"]'],
    "numbers.range_step": ["1", "9", "3"],
    "object.subset": ['{"a": [1, 2, {3}]}', '{"a": [1, 2, {3}]}'],
    "regex.find_n": ['"[0-9]+"', '"a1b22"', "2"],
    "regex.replace": ['"ababc"', '"(a)b"', '"$1-"'],
    "regex.split": ['"a*b"', '"xaabybz"'],
    "regex.template_match": ['"urn:{.*}:x"', '"urn:a:x"', '"{"', '"}"'],
    "semver.compare": ['"1.2.3-rc.1"', '"1.2.3"'],
    "semver.is_valid": ['"1.2.3"'],
    "sprintf": ['"%d %s %v %x %5.2f %+q"', '[1, "a", {"b": [2]}, 255, 0.5, "\\n"]'],
    "strings.any_prefix_match": ['["abc", "b"]', '{"ab", "x"}'],
    "strings.any_suffix_match": ['"abc"', '["bc"]'],
    "strings.count": ['"banana"', '"an"'],
    "strings.split_n": ['"a,b,c"', '","', "2"],
    "time.add_date": ["1700000000123456789", "1", "2", "-3"],
    "time.clock": ['[1700000000123456789, "Europe/Berlin"]'],
    "time.date": ['[1700000000123456789, "America/New_York"]'],
    "time.diff": ["1700000000123456789", "1600000000000000000"],
    "time.format": ['[1700000000123456789, "Asia/Tokyo", "Mon Jan _2 15:04:05.000 MST 2006"]'],
    "time.parse_duration_ns": ['"1h2m3.5s"'],
    "time.parse_ns": ['"2006-01-02T15:04:05.999Z07:00"', '"2026-11-25T01:02:03.4+05:30"'],
    "time.parse_rfc3339_ns": ['"2026-11-25T01:02:03.4+05:30"'],
    "time.weekday": ["1700000000123456789"],
    "time.now_ns": [],
    "units.parse": ['"1.5Ki"'],
    "units.parse_bytes": ['"1.5GiB"'],
    "uri.is_valid": ['"https://a.example:8443/b?c=d#e"'],
    "uri.parse": ['"https://u@a.example:8443/b%20c?d=e&f#g"'],
    "urlquery.decode": ['"a%20b+c"'],
    "urlquery.decode_object": ['"a=1&b=2&a=%20"'],
    "urlquery.encode": ['"a b&c"'],
    "urlquery.encode_object": ['{"a": ["1", "2"], "b": {"c"}, "d": "e"}'],
    "uuid.parse": ['"f81d4fae-7dec-11d0-a765-00a0c91e6bf6"'],
}
ODD: Final = (
    '""', "null", "{}", "[]", "set()", "-1", "0.1", "1e308", "1e999999999", "9" * 400, "true",
    '"%"', '"%[3]*.[2]*[1]f"', '"%99999999d"', '"(a*)*b"', '"[^]"', '"(?:"', '"\\\\"', '"\\ud800"',
    '"\\u0000"', '"a"', '["a", "b"]', '{"a": 1}', "{1, 2}", '{{1}: [2], {}: "b"}', "[" * 60 + "]" * 60,
    '"0.0.0.0/0"', '"::ffff:1.2.3.4/96"', '"2006-01-02"', '"Local"', '"../etc/passwd"', "1.0", "1e2",
    f'"{SECRET}"', '{"op": "move", "from": "/a", "path": "/a/b"}', '"9223372036854775807ns"', "?",
)  # fmt: skip
LARGEST: Final = 2_000
"""Times that a part of an argument is repeated at most."""


def samples() -> Iterable[bytes]:
    for number in range(len(NAMES)):
        yield bytes([number])


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    name = choices.pick(sorted(NAMES))
    arguments = [_argument(usual, choices) for usual in USUAL[name]]
    result = refuses(lambda: call(name, arguments, EVALUATION), BuiltinError)
    if result is None:
        return False
    assert len(result) <= MAX_RESULT_BYTES
    # What the module reads is what was meant, and the same again.
    assert dump(parse(result)) == result
    assert call(name, arguments, EVALUATION) == result
    return True


def _argument(usual: str, choices: Choices) -> bytes:
    match choices.number(6):
        case 1:
            return choices.pick(ODD).encode()
        case 2:
            return choices.some()
        case 3:
            return edited_bytes(usual.encode(), choices)
        case 4:
            return _repeated(usual.encode(), choices)
        case 5:
            return b"[%b]" % b", ".join([usual.encode()] * (1 + choices.number(LARGEST)))
        case _:
            return usual.encode()


def _repeated(text: bytes, choices: Choices) -> bytes:
    start = choices.number(len(text))
    end = start + 1 + choices.number(8)
    return text[:start] + text[start:end] * (1 + choices.number(LARGEST)) + text[end:]
