"""Everything that can be known of a bundle before it is released."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject
from pdp.identity.subject import Subject
from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.questions import Estate, Only, Questionnaire
from pdp.policy.archive import Files
from pdp.policy.authoring import schemas
from pdp.policy.authoring.command import Done, run
from pdp.policy.authoring.findings import Finding, Severity, broken_json
from pdp.policy.authoring.names import check_names
from pdp.policy.authoring.sources import folder_of, opa_sources
from pdp.policy.bundle import Bundle, assemble
from pdp.policy.compile import compile_rego
from pdp.policy.contract import check_answer
from pdp.policy.engine import BundleError, Entrypoint, PolicyError
from pdp.policy.part import is_test, read_part
from pdp.policy.question import authorize_input, budget_input, tools_input
from pdp.policy.service_class import service_class_input
from pdp.policy.wasm import WasmEvaluator
from pdp.reason import ReasonCode

MAX_SAMPLES: Final = 2_000
"""Questions that each entrypoint is asked."""
MEMORY_MAX_MIB: Final = 2_048
MAX_ERRORS: Final = "1000"
"""How many errors OPA lists before it gives up."""
_UNKNOWN_SCHEMA: Final = "undefined schema:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """The commands that checks are made with."""

    opa: Path
    regal: Path | None
    """None where there is none: then nothing is linted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check found, and what it did not look at."""

    findings: tuple[Finding, ...]
    samples: int = 0
    """Answers that were held against the contract."""
    notes: tuple[str, ...] = field(default=())
    """What was not checked, and why."""


def check(files: Files, commands: Commands, *, place: str) -> Checked:
    """Check the sources of a bundle, or a built one. ``place`` is its path, for messages."""
    try:
        part = read_part(files, name=place, place=place, verifier=None)
        bundle = assemble([part])
    except BundleError as error:
        broken = tuple(broken_json(files))
        return Checked(findings=broken or (_error(error.message),))
    if not (part.rego or part.wasm or part.data):
        return Checked(findings=(_error(_NOTHING),))
    notes: list[str] = []
    findings: list[Finding] = []
    if any(not is_test(name) for name in part.rego):
        findings += _compiled(bundle, files, commands.opa)
        if findings:
            return Checked(findings=tuple(findings))
    else:
        notes.append("It holds no Rego, so only its policy.wasm and its data are checked.")
    samples = 0
    try:
        if bundle.wasm is None and part.rego:
            wasm = compile_rego(bundle.rego, bundle.data, opa=commands.opa)
            bundle = replace(bundle, wasm=wasm)
        if bundle.wasm is None:
            notes.append("It holds no rules: what it decides is not checked.")
        else:
            contract = _contract(bundle, commands.opa)
            findings += contract.findings
            samples = contract.samples
    except BundleError as error:
        findings.append(_error(error.message))
    findings += check_names(part.data, part.rego, files)
    if part.wasm is not None:
        notes.append("It is built, so its Rego is not linted; lint its sources.")
    elif commands.regal is None:
        notes.append("There is no regal on PATH, so the Rego is not linted.")
    else:
        linted = _linted(files, commands.regal)
        findings += sorted(linted, key=lambda finding: (finding.file, finding.row))
    return Checked(findings=tuple(findings), samples=samples, notes=tuple(notes))


_NOTHING: Final = (
    "There is no Rego, no policy.wasm and no data: name the directory that holds .manifest, or"
    " the .tar.gz."
)


def _error(message: str) -> Finding:
    return Finding(severity=Severity.ERROR, message=message)


# OPA


def _compiled(bundle: Bundle, files: Files, opa: Path) -> list[Finding]:
    """What OPA's compiler says, strictly, and with the types that the input has."""
    own = {
        name: content
        for name, content in files.items()
        if name.startswith("schemas/") and name.endswith(".json")
    }
    with (
        folder_of(opa_sources(bundle.rego, bundle.data)) as folder,
        folder_of(own) as beside,
    ):
        # Rego that names a schema is held against that one, all other against any input.
        named = beside / "schemas" if own else schemas.FOLDER
        found = [
            *_opa_check(opa, folder, named),
            *(
                finding
                for finding in _opa_check(opa, folder, schemas.ANY_INPUT)
                if not finding.message.startswith(_UNKNOWN_SCHEMA)
            ),
        ]
    return list(dict.fromkeys(found))


def _opa_check(opa: Path, folder: Path, schema: Path) -> Iterator[Finding]:
    options = ["--strict", "--format", "json", "--max-errors", MAX_ERRORS, "--schema", str(schema)]
    done = run(opa, ["check", "--bundle", ".", *options], folder=folder)
    if done.code == 0:
        return
    for error in _listed(done, "errors"):
        message = error["message"]
        details = error.get("details")
        if isinstance(details, dict) and isinstance(details.get("oneOf"), list):
            message += f"; there are {', '.join(map(str, details['oneOf']))}"
        location = error.get("location") or {}
        yield Finding(
            severity=Severity.ERROR,
            message=message,
            file=location.get("file", ""),
            row=location.get("row", 0),
        )


def _listed(done: Done, key: str) -> list[Any]:
    """A list in what a command wrote as JSON. Raises BundleError when it wrote other things."""
    document = done.json()
    listed = document.get(key) if isinstance(document, dict) else None
    return listed if isinstance(listed, list) else []


# Regal


def _linted(files: Files, regal: Path) -> Iterator[Finding]:
    """What Regal says, by the rules that the bundle's .regal.yaml sets."""
    rego = {
        name: content
        for name, content in files.items()
        if name.endswith((".rego", ".regal.yaml", ".regal/config.yaml"))
    }
    with folder_of(rego) as folder:
        done = run(
            regal,
            ["lint", "--format", "json", "."],
            folder=folder,
            # It would ask the network whether it is the newest.
            environment={"REGAL_DISABLE_VERSION_CHECK": "1", "HOME": str(folder)},
        )
    for violation in _listed(done, "violations"):
        location = violation["location"]
        yield Finding(
            severity=Severity.WARNING,
            message=f"{violation['description']} (regal: {violation['title']})",
            file=location["file"].removeprefix("./"),
            row=location["row"],
        )


# The contract of the entrypoints


def _contract(bundle: Bundle, opa: Path) -> Checked:
    """Ask each entrypoint what the data suggest, and read the answers as the sidecar does.

    Raises BundleError when the embedded engine can not load the bundle.
    """
    faults: dict[tuple[Entrypoint, str], Finding] = {}
    samples = 0
    with WasmEvaluator(bundle, memory_max_mib=MEMORY_MAX_MIB) as evaluator:
        for entrypoint, documents in _samples(bundle).items():
            for document in islice(documents, MAX_SAMPLES):
                samples += 1
                try:
                    check_answer(entrypoint, evaluator.evaluate(entrypoint, document))
                except PolicyError as error:
                    if error.reason_code == ReasonCode.POLICY_UNDEFINED:
                        continue
                    if (entrypoint, error.message) in faults:
                        continue
                    fault = _error(f"{entrypoint}: {error.message} It was asked {_told(document)}.")
                    if error.reason_code == ReasonCode.POLICY_ERROR:
                        fault = _with_reason(fault, bundle, entrypoint, document, opa)
                    faults[entrypoint, error.message] = fault
    return Checked(findings=tuple(faults.values()), samples=samples)


def _with_reason(
    fault: Finding, bundle: Bundle, entrypoint: Entrypoint, document: JsonObject, opa: Path
) -> Finding:
    """The fault with what a real OPA says of it, which knows the lines: the embedded engine
    only says that it failed. As it was where OPA has nothing to say.
    """
    rego = {name: text for name, text in bundle.rego.items() if not is_test(name)}
    query = f"data.{entrypoint.replace('/', '.')}"
    with (
        folder_of(opa_sources(rego, bundle.data)) as folder,
        folder_of({_INPUT: json.dumps(document).encode()}) as beside,
    ):
        options = ["--format", "json", "--bundle", ".", "--input", str(beside / _INPUT)]
        done = run(opa, ["eval", *options, query], folder=folder)
    try:
        said = _listed(done, "errors")
    except BundleError:
        return fault
    if not said:
        return fault
    location = said[0].get("location") or {}
    return replace(
        fault,
        message=f"{fault.message}\n{said[0]['message']}",
        file=location.get("file", ""),
        row=location.get("row", 0),
    )


_INPUT: Final = "input.json"


def _samples(bundle: Bundle) -> Mapping[Entrypoint, Iterator[JsonObject]]:
    return {
        Entrypoint.AUTHZ_DECISION: _calls(bundle),
        Entrypoint.BUDGET_DECISION: _spends(bundle),
        Entrypoint.BUDGET_LIMITS: _spends(bundle),
        Entrypoint.SERVICE_CLASS: _tenants(bundle),
        Entrypoint.TOOLS_VISIBLE: _listings(bundle),
    }


def _calls(bundle: Bundle) -> Iterator[JsonObject]:
    """A call by nobody, and one of every tool by every role of every tenant."""
    yield authorize_input(
        _NOBODY, tool="none", arguments={}, resource=None, time=0, request_id="check", context={}
    )
    questions = Questionnaire([Estate(bundle.data)], Cases(), Only())
    for tenant in questions.tenants():
        yield from (question.document() for question in questions.of(tenant))


def _spends(bundle: Bundle) -> Iterator[JsonObject]:
    """A spend by nobody, and one by every role of every tenant."""
    yield _spend(_NOBODY)
    questions = Questionnaire([Estate(bundle.data)], Cases(), Only())
    for tenant in questions.tenants():
        for role in questions.roles(tenant):
            yield _spend(Subject(tenant=tenant, actor="check", roles=(role,)))


def _listings(bundle: Bundle) -> Iterator[JsonObject]:
    """A listing for nobody, and one for every role of every tenant."""
    yield tools_input(_NOBODY, time=0, context={})
    questions = Questionnaire([Estate(bundle.data)], Cases(), Only())
    for tenant in questions.tenants():
        for role in questions.roles(tenant):
            subject = Subject(tenant=tenant, actor="check", roles=(role,))
            yield tools_input(subject, time=0, context={})


def _tenants(bundle: Bundle) -> Iterator[JsonObject]:
    """Every tenant, and one that there is not."""
    yield service_class_input(_NOBODY.tenant)
    yield from map(service_class_input, Estate(bundle.data).tenants)


def _spend(subject: Subject) -> JsonObject:
    return budget_input(
        subject,
        operation="charge",
        charges=[Charge(budget="llm", unit="tokens_in", amount=1)],
        tool="",
        time=0,
        request_id="check",
    )


_NOBODY: Final = Subject(tenant="nobody", actor="nobody")


def _told(document: JsonObject) -> str:
    """Who asked what; all of it is made here."""
    subject: Any = document["subject"]
    action: Any = document.get("action")
    told = {"tenant": subject["properties"]["tenant"]}
    if action is not None:
        told |= {"roles": subject["properties"]["roles"], "action": action["name"]}
    return json.dumps(told)
