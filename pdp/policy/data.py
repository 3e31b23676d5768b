"""The data of a bundle: JSON or YAML files, each at the place that its folder names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import yaml

from pdp.canonical import MAX_DEPTH, JsonError, JsonObject, JsonValue, check, parse, parse_object
from pdp.policy.archive import MAX_CONTENT_BYTES, Files, refused
from pdp.policy.roots import first_outside

MAX_YAML_BYTES: Final = 1024 * 1024
"""YAML is slow to read, and is for people; programs write JSON."""
_JSON_NAME: Final = "data.json"
_YAML_NAMES: Final = frozenset({"data.yaml", "data.yml"})
_JSON_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_MINUS_ZERO: Final = re.compile(r"-[0.]+([eE].*)?")
_LIKE_A_NUMBER: Final = re.compile(
    r"[-+]?\.?[0-9][-+.0-9A-Fa-fXxOo_]*|[-+]?\.(inf|nan)", re.IGNORECASE
)
_WORDS: Final[Mapping[str, JsonValue]] = {
    "": None, "~": None, "null": None, "true": True, "false": False,
}  # fmt: skip
_WORDS_OF_SOME: Final = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def is_data(name: str) -> bool:
    """Whether a file of a bundle is part of its data document."""
    return _base(name) == _JSON_NAME or _base(name) in _YAML_NAMES


def parse_json_object(name: str, content: bytes, *, place: str) -> JsonObject:
    """A file that is one JSON object. Raises BundleError."""
    try:
        return parse_object(content, max_bytes=MAX_CONTENT_BYTES)
    except JsonError as error:
        raise refused(place, f"has a {name} that {error}") from None


def parse_data(name: str, content: bytes, *, place: str) -> JsonValue:
    """A data file. Raises BundleError."""
    try:
        return parse(content, max_bytes=MAX_CONTENT_BYTES)
    except JsonError as error:
        if _base(name) not in _YAML_NAMES:
            raise refused(place, f"has a {name} that {error}") from None
    return _parse_yaml(name, content, place)


def data_document(files: Files, *, roots: Sequence[str], place: str) -> JsonObject:
    """All data files as one document. Raises BundleError: for a file that is not well
    formed, lies outside of the roots, or has a value where another file has one.
    """
    document: JsonObject = {}
    for name in sorted(filter(is_data, files)):
        if name.startswith("."):
            raise refused(place, f"has data in {name}; OPA passes over the dot that it begins with")
        value = parse_data(name, files[name], place=place)
        folders = name.split("/")[:-1]
        if not folders and not isinstance(value, dict):
            raise refused(place, f"has a {name} that must be an object")
        outside = first_outside(roots, value, tuple(folders))
        if outside is not None:
            shown = json.dumps("/".join(outside))
            raise refused(
                place, f"has data in {name} at {shown}, outside of the roots in .manifest"
            )
        for folder in reversed(folders):
            value = {folder: value}
        if not isinstance(value, dict) or not _merge(document, value):
            raise refused(place, f"has a {name} where other data stands already")
    try:
        check(document)
    except JsonError as error:
        raise refused(place, f"has data that {error}") from None
    return document


def _merge(document: JsonObject, more: JsonObject) -> bool:
    """Add to a document; False where both have a value that is not an object."""
    for key, value in more.items():
        if key not in document:
            document[key] = value
            continue
        below = document[key]
        if not isinstance(below, dict) or not isinstance(value, dict) or not _merge(below, value):
            return False
    return True


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


# YAML, but only what every parser reads alike: no anchors, tags, merge keys or second
# document, and no plain scalar that is a number or a truth value to some parsers only.


def _parse_yaml(name: str, content: bytes, place: str) -> JsonValue:
    if len(content) > MAX_YAML_BYTES:
        raise refused(
            place, f"has a {name} of more than {MAX_YAML_BYTES} bytes; write so much as JSON"
        )
    try:
        events = yaml.parse(content.decode("utf-8"), Loader=yaml.CSafeLoader)
        value = _only_document(events)
        check(value)
    except UnicodeDecodeError:
        raise refused(place, f"has a {name} that is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise refused(place, f"has a {name} that is not YAML{where}") from None
    except yaml.YAMLError:
        raise refused(place, f"has a {name} that is not YAML") from None
    except JsonError as error:
        raise refused(place, f"has a {name} that {error}") from None
    return value


def _only_document(events: Iterator[yaml.Event]) -> JsonValue:
    value: JsonValue = None
    count = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            count += 1
            if count > 1:
                raise JsonError(f"holds a second document {_line(event)}")
            value = _value(next(events), events, MAX_DEPTH)
    return value


def _value(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> JsonValue:
    if isinstance(event, yaml.AliasEvent):
        raise JsonError(f"holds an alias {_line(event)}; write the value out")
    if isinstance(event, yaml.NodeEvent) and (
        event.anchor is not None or getattr(event, "tag", None) is not None
    ):
        raise JsonError(f"holds an anchor or a tag {_line(event)}; leave it out")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    if depth == 0:
        raise JsonError(f"is nested more than {MAX_DEPTH} deep")
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[JsonValue] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(event, events, depth - 1))
        return items
    return _members(events, depth)


def _members(events: Iterator[yaml.Event], depth: int) -> JsonObject:
    members: JsonObject = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _value(event, events, depth - 1)
        if not isinstance(key, str):
            raise JsonError(f"holds a key {_line(event)} that is not text; write it in quotes")
        if key in members:
            raise JsonError(f"holds a duplicate key {_line(event)}")
        if key == "<<":
            raise JsonError(f"holds a merge key {_line(event)}; write the values out")
        members[key] = _value(next(events), events, depth - 1)
    return members


def _scalar(event: yaml.ScalarEvent) -> JsonValue:
    text = event.value
    if event.style:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _JSON_NUMBER.fullmatch(text) and not _MINUS_ZERO.fullmatch(text):
        return parse(text.encode(), max_bytes=MAX_YAML_BYTES)
    if _LIKE_A_NUMBER.fullmatch(text) or text.lower() in _WORDS_OF_SOME:
        raise JsonError(
            f"holds a value {_line(event)} that YAML parsers read differently; write it in quotes,"
            " or as JSON would have it"
        )
    return text


def _line(event: yaml.Event) -> str:
    mark = event.start_mark
    return "" if mark is None else f"at line {mark.line + 1}"
