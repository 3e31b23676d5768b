"""OPA's own conformance cases: what a rule gives in OPA, for some 2,400 small policies.

They lie in the Go module of OPA (v1/test/cases/testdata); those of Rego v1 are read,
which is all that bundles are written in.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.builtins.values import Object, Value, dump, in_order, parse, text_of

OPA_VERSION: Final = "1.22.2"
_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_UNPACKED: Final = _ROOT / ".tools" / "opa-cases"
_IN_MODULE: Final = (
    f"github.com/open-policy-agent/opa@v{OPA_VERSION}/v1/test/cases/testdata"  # below GOMODCACHE
)
_GENERATED: Final = "__localq"
"""How variables begin that OPA's compiler has made up."""


class CasesMissingError(Exception):
    """OPA's cases are not on this machine. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case. Two may share a note, so the number tells them apart."""

    number: int
    folder: str
    note: str
    query: str
    modules: tuple[str, ...]
    data: JsonObject
    document: bytes
    """The input in OPA's text form; empty is undefined."""
    wanted: frozenset[Value] | None
    """One object of bindings for each answer of the query; None where OPA fails."""
    fails_only_when_strict: bool
    """Where OPA fails: the failure is of a built-in, and else without an answer."""
    in_any_order: bool
    """An array that is bound is a set to those who compare."""

    @property
    def bindings(self) -> tuple[str, ...]:
        """The variables of the query that an answer binds."""
        names = {
            name
            for answer in self.wanted or ()
            if isinstance(answer, Object)
            for name in answer
            if isinstance(name, str)
        }
        return tuple(sorted(names))

    def answers(self, rows: Value) -> frozenset[Value]:
        """Answers of an engine, in a form that can be compared with the wanted ones."""
        assert isinstance(rows, tuple)
        return frozenset(_answer(row, in_any_order=self.in_any_order) for row in rows)


def find_cases() -> Path:
    """The folder that holds OPA's cases. Raises CasesMissingError."""
    places = [_UNPACKED]
    go = shutil.which("go")
    if go is not None:
        found = subprocess.run(
            [go, "env", "GOMODCACHE"], capture_output=True, text=True, timeout=60, check=False
        )
        if found.returncode == 0:
            places.append(Path(found.stdout.strip()) / _IN_MODULE)
    for place in places:
        if (place / "v1").is_dir():
            return place
    raise CasesMissingError(
        f"The conformance cases of OPA {OPA_VERSION} are not on this machine. With Go and its"
        " module proxy at hand, fetch them once: go mod download"
        f" github.com/open-policy-agent/opa@v{OPA_VERSION}; or put the folder"
        " v1/test/cases/testdata of OPA's sources at .tools/opa-cases"
    )


def read_cases(place: Path) -> list[Case]:
    """All cases of Rego v1, in the order of their files."""
    return list(_read(place / "v1"))


def _read(folder: Path) -> Iterator[Case]:
    number = 0
    for file in sorted(folder.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        for entry in yaml.load(text, Loader=_Loader)["cases"]:  # noqa: S506 - a safe one
            yield _case(number, file.relative_to(folder).parts[0], entry)
            number += 1


def _case(number: int, folder: str, entry: JsonObject) -> Case:
    modules = entry.get("modules") or []
    data = entry.get("data") or {}
    in_any_order = bool(entry.get("sort_bindings"))
    wanted = None
    if "want_error" not in entry and "want_error_code" not in entry:
        rows = entry["want_result"]
        assert isinstance(rows, list)
        wanted = frozenset(_answer(_value(row), in_any_order=in_any_order) for row in rows)
    assert isinstance(modules, list)
    assert isinstance(data, dict)
    return Case(
        number=number,
        folder=folder,
        note=str(entry["note"]),
        query=str(entry["query"]),
        modules=tuple(map(str, modules)),
        data=data,
        document=_document(entry),
        wanted=wanted,
        fails_only_when_strict=bool(entry.get("strict_error")),
        in_any_order=in_any_order,
    )


def _document(entry: JsonObject) -> bytes:
    if "input_term" in entry:
        return dump(parse(_normal(str(entry["input_term"])).encode()))
    return json.dumps(entry["input"]).encode() if "input" in entry else b""


def _normal(term: str) -> str:
    return re.sub(r",(\s*[}\]])", r"\1", term)


def _value(value: JsonValue) -> Value:
    return parse(json.dumps(value).encode())


def _answer(row: Value, *, in_any_order: bool) -> Value:
    assert isinstance(row, Object)
    return Object(
        (name, _bound(value, in_any_order=in_any_order))
        for name, value in row.items()
        if not (isinstance(name, str) and name.startswith(_GENERATED))
    )


def _bound(value: Value, *, in_any_order: bool) -> Value:
    listed = _without_sets(value)
    return tuple(in_order(listed)) if in_any_order and isinstance(listed, tuple) else listed


def _without_sets(value: Value) -> Value:
    """A value as OPA writes it in JSON: sets as arrays in order, keys as strings."""
    match value:
        case tuple():
            return tuple(map(_without_sets, value))
        case frozenset():
            return tuple(map(_without_sets, in_order(value)))
        case Object():
            return Object(
                (key if isinstance(key, str) else text_of(_without_sets(key)), _without_sets(item))
                for key, item in value.items()
            )
        case _:
            return value


class _Loader(yaml.CSafeLoader):
    """Reads plain scalars as OPA's YAML parser does, which knows no ``on`` and no dates."""


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:[0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?",
}.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})$"), [None]
    )
