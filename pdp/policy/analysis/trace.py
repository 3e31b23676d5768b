"""Which rules gave a decision, and which conditions failed: from OPA's own trace."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pdp.canonical import JsonObject
from pdp.errors import PdpError
from pdp.policy.bundle import Bundle
from pdp.policy.engine import Entrypoint
from pdp.reason import ReasonCode

TIMEOUT_SECONDS: Final = 30
MAX_TEXT_LINES: Final = 12
MAX_VALUE_LENGTH: Final = 60


class TraceError(PdpError):
    """There is no trace; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.POLICY_UNAVAILABLE, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rule or a condition in the sources."""

    file: str
    row: int
    text: str
    """As it is written there."""
    rule: str
    """The name of the rule that it is, or stands in."""
    values: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What the variables of a condition were."""

    @property
    def where(self) -> str:
        """file:line."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What OPA did to come to a decision."""

    fired: tuple[Place, ...]
    """The rules that held, those that said the reason first."""
    decisive: tuple[Place, ...]
    """The rules among them whose own text says the reason."""
    failed: tuple[Place, ...]
    """The conditions whose failing led to a denial; none when it is allowed."""
    held: tuple[Place, ...]
    """The conditions that held in a rule which denies, where no other failed."""
    error: str = ""
    """What OPA says where the evaluation fails, as for two values of one rule."""


def trace(bundle: Bundle, document: JsonObject, *, opa: Path, reason_code: str) -> Trace:
    """Evaluate once more with the opa command. Raises TraceError.

    The bundle is one that the embedded engine has loaded, so it reaches no network.
    """
    if not bundle.rego:
        raise TraceError("the bundle carries no Rego sources, so its rules can not be named")
    with tempfile.TemporaryDirectory() as folder:
        _write(bundle, Path(folder))
        events, error = _events(Path(folder), document, opa)
    return replace(_Reader(bundle.rego, events).read(reason_code), error=error)


def _write(bundle: Bundle, folder: Path) -> None:
    for name, text in bundle.rego.items():
        if not name.endswith("_test.rego"):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    (folder / "data.json").write_bytes(bundle.data)


def _events(folder: Path, document: JsonObject, opa: Path) -> tuple[list[dict[str, Any]], str]:
    """The events of the evaluation, and the error that it ended with, if any."""
    query = f"data.{Entrypoint.AUTHZ_DECISION.replace('/', '.')}"
    command = [
        str(opa.absolute()),
        "eval",
        "--explain",
        "full",
        "--format",
        "json",
        "--stdin-input",
    ]
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own opa
            [*command, "--disable-indexing", "--bundle", ".", query],
            cwd=folder,
            input=json.dumps(document),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        said = json.loads(done.stdout)
        events: list[dict[str, Any]] = said.get("explanation", [])
        errors = [str(error.get("message")) for error in said.get("errors") or []]
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise TraceError(f"the opa command gave no trace: {type(error).__name__}") from None
    if not events:
        raise TraceError("the opa command gave no trace: it could not evaluate the bundle")
    return events, "\n".join(errors)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A condition that failed, with nothing below it that explains it."""

    file: str
    row: int
    column: int
    """From 1; 0 when the condition is a part that the compiler made out of one."""
    is_negated: bool
    values: Mapping[str, str] = field(hash=False)


@dataclass(slots=True)
class _Query:
    """One body that OPA worked on: of a rule, or of a part of one."""

    parent: int
    node: Any
    """The rule's syntax tree, if it is one."""
    file: str
    row: int
    did_exit: bool = False
    is_explained: bool = False
    """Something failed below the expression that is being evaluated."""
    failures: list[_Failure] = field(default_factory=list)
    evaluated: list[tuple[int, int]] = field(default_factory=list)
    """Row and column of each condition that was tried, as the author wrote it."""

    @property
    def head(self) -> Mapping[str, Any] | None:
        """The rule's head; None for a part of one."""
        return self.node["head"] if isinstance(self.node, dict) and "head" in self.node else None

    @property
    def is_default(self) -> bool:
        """It is a rule that stands in where no other of its name has a value."""
        return isinstance(self.node, dict) and self.node.get("default") is True


class _Reader:
    """Reads the events of one evaluation."""

    def __init__(self, rego: Mapping[str, str], events: list[dict[str, Any]]) -> None:
        self._lines = {name: text.splitlines() for name, text in rego.items()}
        self._queries: dict[int, _Query] = {}
        self._exited: list[int] = []
        for event in events:
            self._take(event)

    def read(self, reason_code: str) -> Trace:
        """What the events say of a decision with this reason."""
        fired = [number for number in self._exited if self._queries[number].head is not None]
        decisive = [n for n in fired if _mentions(self._queries[n].head, reason_code)]
        failed: list[Place] = []
        held: list[Place] = []
        if reason_code != ReasonCode.OK:
            # A default says nothing of why it had to stand in; what failed elsewhere does.
            denying = [n for n in decisive if not self._queries[n].is_default]
            for number in denying:
                failed += self._failures(number)
            if denying and not failed:
                held = [place for number in denying for place in self._body(number)]
            if not denying:
                failed = self._failures(0, negated=False) or self._failures(0, negated=True)
        return Trace(
            fired=tuple(dict.fromkeys(self._rule(n) for n in fired)),
            decisive=tuple(dict.fromkeys(self._rule(n) for n in decisive)),
            failed=tuple(dict.fromkeys(failed)),
            held=tuple(dict.fromkeys(held)),
        )

    def _take(self, event: dict[str, Any]) -> None:
        number, operation, node = event["QueryID"], event["Op"], event.get("Node")
        location = event.get("Location") or {}
        file, row = location.get("file", ""), location.get("row", 0)
        query = self._queries.setdefault(number, _Query(event["ParentID"], node, file, row))
        is_made = isinstance(node, dict) and node.get("generated") is True
        if operation == "Eval":
            query.is_explained = False
            if not is_made:
                query.evaluated.append((row, location.get("col", 0)))
        elif operation == "Exit":
            if not query.did_exit:
                self._exited.append(number)
            query.did_exit = True
            # A default stands in for what failed: that still explains what fails next.
            if not query.is_default:
                for above in self._above(query.parent):
                    self._queries[above].is_explained = False
        elif operation == "Fail":
            if not query.is_explained:
                is_negated = isinstance(node, dict) and node.get("negated") is True
                column = 0 if is_made else location.get("col", 0)
                failure = _Failure(file, row, column, is_negated, _values(event))
                query.failures.append(failure)
            for above in self._above(query.parent):
                self._queries[above].is_explained = True

    def _above(self, number: int) -> Iterator[int]:
        """A query and those that it is evaluated for, up to the first one, which is 0."""
        while True:
            yield number
            if number == 0:
                return
            number = self._queries[number].parent

    def _failures(self, top: int, *, negated: bool | None = None) -> list[Place]:
        """What failed below a query, except where the attempt held in another way."""
        found = []
        for number, query in self._queries.items():
            path = list(self._above(number))
            if top not in path:
                continue
            between = path[: path.index(top)]
            if not any(self._queries[n].did_exit for n in between):
                found += [
                    self._condition(number, failure)
                    for failure in query.failures
                    if failure.file and (negated is None or failure.is_negated is negated)
                ]
        return found

    def _condition(self, number: int, failure: _Failure) -> Place:
        rules = (n for n in self._above(number) if self._queries[n].head is not None)
        return Place(
            file=failure.file,
            row=failure.row,
            text=self._text(failure.file, failure.row, failure.column),
            rule=_name(self._queries[next(rules, number)].head),
            values=failure.values,
        )

    def _rule(self, number: int) -> Place:
        query = self._queries[number]
        text = self._lines[query.file][query.row - 1].strip() if query.file in self._lines else ""
        return Place(file=query.file, row=query.row, text=text, rule=_name(query.head))

    def _body(self, number: int) -> Iterator[Place]:
        """The conditions of a rule, without what the compiler made out of them."""
        query = self._queries[number]
        if not query.evaluated:
            yield self._rule(number)
        for row, column in query.evaluated:
            yield Place(
                file=query.file,
                row=row,
                text=self._text(query.file, row, column),
                rule=_name(query.head),
            )

    def _text(self, file: str, row: int, column: int) -> str:
        """An expression as it is written: from its place on, until its brackets close."""
        lines = self._lines.get(file, [])
        if not 0 < row <= len(lines):
            return ""
        text = lines[row - 1][max(0, column - 1) :].strip()
        for line in lines[row : row + MAX_TEXT_LINES]:
            if sum(map(text.count, "([{")) <= sum(map(text.count, ")]}")):
                break
            text += f" {line.strip()}"
        return text


def _values(event: Mapping[str, Any]) -> dict[str, str]:
    """The variables of the author that hold something short."""
    metadata = event.get("LocalMetadata") or {}
    found = {}
    for local in event.get("Locals") or []:
        named = metadata.get(local["name"], {}).get("name", local["name"])
        value = local.get("value")
        if not named.startswith("__") and local.get("type") in {"string", "number", "boolean"}:
            text = json.dumps(value, ensure_ascii=False)
            if len(text) <= MAX_VALUE_LENGTH:
                found[named] = text
    return dict(sorted(found.items()))  # OPA lists them in another order each time


def _mentions(node: object, text: str) -> bool:
    """Whether a string stands in a syntax tree."""
    if isinstance(node, dict):
        if node.get("type") == "string" and node.get("value") == text:
            return True
        return any(_mentions(below, text) for key, below in node.items() if key != "location")
    return isinstance(node, list) and any(_mentions(below, text) for below in node)


def _name(head: Mapping[str, Any] | None) -> str:
    if head is None:
        return ""
    parts = [str(part["value"]) for part in head.get("ref", []) if "value" in part]
    return ".".join(parts) or str(head.get("name", ""))
