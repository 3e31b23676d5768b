"""What `pdp policy check` finds, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdp.policy.archive import pack, read_archive, read_directory
from pdp.policy.authoring.check import Checked, Commands, check
from pdp.policy.authoring.findings import DataPlaces, Severity
from pdp.policy.authoring.names import check_names
from pdp.policy.compile import build_files
from pdp.policy.part import read_part

ROOT = Path(__file__).resolve().parents[3]
REGAL = ROOT / ".tools" / "regal"
AUTHZ, ARGUMENTS = "pdp/authz/authz.rego", "pdp/arguments/arguments.rego"
TENANTS, TOOLS = "tenants/data.json", "tools/data.json"


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    files = read_directory(ROOT / "policies")
    del files["bundle.tar.gz"]
    return files


def checked(files: dict[str, bytes], opa: Path, *, regal: Path | None = None) -> Checked:
    return check(files, Commands(opa=opa, regal=regal), place="policies")


def changed(files: dict[str, bytes], name: str, old: str, new: str) -> dict[str, bytes]:
    text = files[name].decode()
    assert old in text
    return {**files, name: text.replace(old, new).encode()}


def with_data(files: dict[str, bytes], name: str, change: dict[str, Any]) -> dict[str, bytes]:
    """Data with some of its values replaced, by their path: "tenant_acme/status"."""
    document = json.loads(files[name])
    for path, value in change.items():
        *steps, last = path.split("/")
        at = document
        for step in steps:
            at = at[step]
        at[int(last) if isinstance(at, list) else last] = value
    return {**files, name: json.dumps(document, indent=2).encode()}


def told(found: Checked) -> list[str]:
    return [f"{each.place}: {each.message}" for each in found.findings]


def test_nothing_is_wrong_with_the_starter_policy(sources: dict[str, bytes], opa: Path) -> None:
    found = checked(sources, opa, regal=REGAL)

    assert found.findings == ()
    assert found.notes == ()
    assert found.samples > 50


def test_nothing_is_wrong_with_it_once_it_is_built(sources: dict[str, bytes], opa: Path) -> None:
    built = read_archive(
        pack(build_files(sources, opa=opa, revision=None, sequence=1)), place="built"
    )

    found = checked(built, opa, regal=REGAL)

    assert found.findings == ()
    assert found.notes == ("It is built, so its Rego is not linted; lint its sources.",)


def test_a_part_of_the_input_that_does_not_exist_is_an_error_with_its_line(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = changed(sources, AUTHZ, "input.subject.properties.scopes", "input.subject.scopes")
    line = files[AUTHZ].decode().split("input.subject.scopes")[0].count("\n") + 1

    (finding,) = checked(files, opa).findings

    assert finding.severity is Severity.ERROR
    assert finding.place == f"{AUTHZ}:{line}"
    assert finding.message == "undefined ref: input.subject.scopes; there are id, properties, type"


def test_rego_that_names_no_schema_is_held_against_any_input(
    sources: dict[str, bytes], opa: Path
) -> None:
    text = "package pdp.extra\n\nmine if input.subject.tenant == 1\n"

    (finding,) = checked({**sources, "pdp/extra/extra.rego": text.encode()}, opa).findings

    assert finding.place == "pdp/extra/extra.rego:3"
    assert "undefined ref: input.subject.tenant" in finding.message


def test_a_spend_has_charges_and_a_call_has_none(sources: dict[str, bytes], opa: Path) -> None:
    files = changed(sources, AUTHZ, "is_object(tool)", "is_object(input.charges)")

    (finding,) = checked(files, opa).findings

    assert "undefined ref: input.charges" in finding.message


def test_an_author_s_own_schemas_are_used(sources: dict[str, bytes], opa: Path) -> None:
    own = {
        f"schemas/{file.name}": file.read_bytes()
        for file in (ROOT / "pdp" / "policy" / "schemas").glob("*.json")
    }
    mine = {"schemas/mine.json": b'{"type": "object", "properties": {"a": {"type": "string"}}}'}
    text = (
        "# METADATA\n# schemas:\n#   - input.action.properties.arguments: schema.mine\n"
        "package pdp.extra\n\nmine if input.action.properties.arguments.a == 1\n"
    )

    (finding,) = checked(
        {**sources, **own, **mine, "pdp/extra/extra.rego": text.encode()}, opa
    ).findings

    assert finding.place == "pdp/extra/extra.rego:6"
    assert "match error" in finding.message


def test_unused_and_unsafe_variables_are_errors(sources: dict[str, bytes], opa: Path) -> None:
    files = changed(sources, AUTHZ, "\tis_object(tool)", "\tunused := 1\n\tis_object(tool)")
    assert "assigned var unused unused" in told(checked(files, opa))[0]

    files = changed(sources, AUTHZ, "\tis_object(tool)", "\tis_object(toolbox)")
    assert "var toolbox is unsafe" in told(checked(files, opa))[0]


def test_an_answer_that_breaks_the_contract_is_an_error_with_an_example(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = changed(sources, AUTHZ, '"reason_code": "ok",', '"reason_code": "fine",')

    (finding,) = checked(files, opa).findings

    assert finding.severity is Severity.ERROR
    assert finding.message.startswith(
        "pdp/authz/decision: The policy's answer is not of the agreed form: reason_code must be"
        ' "ok" exactly when allow is true. It was asked {"tenant": "tenant_acme"'
    )


def test_a_limit_that_breaks_the_contract_is_an_error(sources: dict[str, bytes], opa: Path) -> None:
    files = changed(sources, TENANTS, '"window": "minute"', '"window": "second"')

    (finding,) = checked(files, opa).findings

    assert "pdp/budget/limits: " in finding.message
    assert "limit.window must be one of " in finding.message


def test_a_service_class_that_breaks_the_contract_is_an_error(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = changed(sources, TENANTS, '{"priority": "high"}', '{"priority": "highest"}')

    (finding,) = checked(files, opa).findings

    assert finding.message == (
        "pdp/sidecar/service_class: The policy's answer is not of the agreed form: priority must"
        ' be one of high, normal, low. It was asked {"tenant": "tenant_acme"}.'
    )


def test_a_listing_of_tools_that_breaks_the_contract_is_an_error(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = changed(sources, "pdp/tools/tools.rego", '"callable": code == "ok"', '"callable": true')

    (finding,) = checked(files, opa).findings

    assert finding.message.startswith(
        "pdp/tools/visible: The policy's answer is not of the agreed form: reason_code must be"
    )
    assert '"action": "tools.list"' in finding.message


def test_two_values_of_one_rule_are_an_error(sources: dict[str, bytes], opa: Path) -> None:
    files = changed(sources, AUTHZ, 'if reason_code != "ok"', 'if reason_code != "none"')

    (finding,) = checked(files, opa).findings[:1]

    assert finding.place.startswith(f"{AUTHZ}:")
    assert "pdp/authz/decision: The policy failed while it ran." in finding.message
    assert "rule data.pdp.authz.decision produced conflicting values:" in finding.message


def test_a_missing_entrypoint_is_an_error(sources: dict[str, bytes], opa: Path) -> None:
    files = {name: text for name, text in sources.items() if not name.startswith("pdp/budget")}

    found = checked(files, opa).findings

    (error,) = (each for each in found if each.severity is Severity.ERROR)
    assert "pdp/budget/decision" in error.message


def test_what_the_embedded_engine_has_not_is_an_error_that_names_the_file(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = changed(sources, AUTHZ, "\tis_object(tool)", "\tis_object(opa.runtime())")

    (finding,) = checked(files, opa).findings

    assert "opa.runtime (in pdp/authz/authz.rego)" in finding.message


def test_what_is_no_bundle_is_one_error(opa: Path) -> None:
    (finding,) = checked({".manifest": b"{"}, opa).findings
    assert (finding.place, finding.message[:11]) == (".manifest:1", "is not JSON")


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    (
        ('  "tenant_acme": {', '  "tenant_acme": {,', ":2: is not JSON: "),
        ('    "status": "active",', '    "status": "", "status": "",', ":3: the key status stands"),
    ),
)
def test_what_can_not_be_read_as_json_is_told_with_its_line(
    sources: dict[str, bytes], opa: Path, old: str, new: str, finding: str
) -> None:
    found = told(checked(changed(sources, TENANTS, old, new), opa))

    assert found[0].startswith(TENANTS + finding)


def test_a_directory_of_something_else_does_not_pass(opa: Path) -> None:
    (finding,) = checked({"bundle.tar.gz": b"x", "notes.txt": b"y"}, opa).findings

    assert finding.severity is Severity.ERROR
    assert "name the directory that holds .manifest" in finding.message


def test_data_alone_is_checked_as_far_as_it_goes(opa: Path) -> None:
    found = checked({"tenants/data.json": b'{"acme": {}}'}, opa)

    assert found.findings == ()
    assert "It holds no rules: what it decides is not checked." in found.notes


def test_regal_speaks_of_the_rego_and_by_the_bundle_s_own_rules(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = {**sources, AUTHZ: sources[AUTHZ] + b"\n#bad comment\n"}

    (finding,) = checked(files, opa, regal=REGAL).findings

    assert finding.severity is Severity.WARNING
    assert "(regal: no-whitespace-comment)" in finding.message
    assert finding.file == AUTHZ


def test_that_there_is_no_regal_is_said(sources: dict[str, bytes], opa: Path) -> None:
    assert checked(sources, opa).notes == ("There is no regal on PATH, so the Rego is not linted.",)


ACME = "tenant_acme"
WORKLOADS = "workloads/data.json"
WORKLOAD = "workload a may "
SLIPS: list[tuple[str, dict[str, Any], str]] = [
    (
        TENANTS,
        {f"{ACME}/allowlist/0": "orders.raed"},
        f"tenant {ACME} allows orders.raed, which is not in data.tools",
    ),
    (
        TENANTS,
        {f"{ACME}/roles/viewer": {"tools": ["orders.drop"]}},
        f"role viewer of tenant {ACME} may use orders.drop, which is not in data.tools",
    ),
    (
        TENANTS,
        {"tenant_initech/roles/viewer": {"tools": ["orders.read", "mail.send"]}},
        "role viewer of tenant tenant_initech may use mail.send, which is not on its allowlist",
    ),
    (
        TENANTS,
        {f"{ACME}/roles/viewer": {"tools": []}},
        f"role viewer of tenant {ACME} may use no tool and charge no budget",
    ),
    (
        TENANTS,
        {f"{ACME}/roles/analyst": {"tools": ["orders.read"]}},
        f"tenant {ACME} allows reports.generate, which none of its roles may use",
    ),
    (
        TENANTS,
        {f"{ACME}/tools/orders.drop": {}},
        f"tenant {ACME} has rules for orders.drop, which is not in data.tools",
    ),
    (
        TENANTS,
        {"tenant_initech/tools": {"mail.send": {}}},
        "tenant tenant_initech has rules for mail.send, which is not on its allowlist",
    ),
    (
        TENANTS,
        {f"{ACME}/tools/mail.send/arguments/cc": {}},
        f"tenant {ACME} has a rule for the argument cc, which mail.send does not take",
    ),
    (
        TENANTS,
        {f"{ACME}/scopes/2": "mail:sent"},
        f"tenant {ACME} has the scope mail:sent, which no tool needs",
    ),
    (
        TENANTS,
        {f"{ACME}/scopes/2": "mail:sent"},
        f"tenant {ACME} allows mail.send, and lacks its scope mail:send",
    ),
    (
        TENANTS,
        {f"{ACME}/limits": []},
        f"tenant {ACME} allows orders.update, whose charge has no limit (calls of tools)",
    ),
    (
        TENANTS,
        {f"{ACME}/limits": []},
        f"role agent of tenant {ACME} may charge what has no limit (tokens_in of llm)",
    ),
    (
        TENANTS,
        {f"{ACME}/status": "Active"},
        f"tenant {ACME} is suspended: its status is none of active, suspended",
    ),
    (TENANTS, {f"{ACME}/alowlist": []}, f"tenant {ACME} has alowlist, which no rule reads"),
    (TENANTS, {"tenant_new": []}, "tenant tenant_new is no object: it counts as unknown"),
    (TOOLS, {"orders.drop": []}, "tool orders.drop is no object: it counts as unknown"),
    (
        TOOLS,
        {"orders.drop": {"scopes": ["orders:drop"]}},
        "tool orders.drop needs the scope orders:drop, which no tenant has",
    ),
    (TOOLS, {"orders.drop": {"scopes": []}}, "tool orders.drop is on no tenant's allowlist"),
    (
        TOOLS,
        {"mail.send/arguments/body": {"type": "string", "max_lenght": 9}},
        "the argument body of tool mail.send has max_lenght, which no rule reads",
    ),
    (
        TENANTS,
        {f"{ACME}/tools/mail.send/arguments/to/domain": []},
        f"the argument to of mail.send of tenant {ACME} has domain, which no rule reads",
    ),
    (TOOLS, {"orders.read/scope": []}, "tool orders.read has scope, which no rule reads"),
    (
        WORKLOADS,
        {"a": {"tools": ["orders.raed"]}},
        WORKLOAD + "use orders.raed, which is not in data.tools",
    ),
    (WORKLOADS, {"a": {"tools": []}}, WORKLOAD + "use no tool"),
    (
        WORKLOADS,
        {"a": {"tools": ["orders.read"], "tenants": ["tenant_amce"]}},
        WORKLOAD + "ask for tenant_amce, which is not in data.tenants",
    ),
    (WORKLOADS, {"a": {"tool": ["orders.read"]}}, WORKLOAD + "use no tool"),
    (
        WORKLOADS,
        {"a": {"tools": ["orders.read"], "tenant": [ACME]}},
        "workload a has tenant, and no tenants: it may ask for all",
    ),
    (
        WORKLOADS,
        {"a": {"tools": ["orders.read"], "tennants": [ACME]}},
        "workload a has tennants, which no rule reads",
    ),
    (WORKLOADS, {"a": ["orders.read"]}, "workload a is no object: it counts as unknown"),
]


@pytest.mark.parametrize(("file", "change", "message"), SLIPS)
def test_a_name_that_nothing_defines_is_a_warning_with_its_file(
    sources: dict[str, bytes], file: str, change: dict[str, Any], message: str
) -> None:
    files = with_data(sources, file, change)
    part = read_part(files, name="it", place="it", verifier=None)

    warnings = {each.message: each for each in check_names(part.data, part.rego, files)}
    assert message in warnings
    assert warnings[message].severity is Severity.WARNING
    assert warnings[message].file == file
    assert warnings[message].row > 0


def test_a_tenant_lets_only_workloads_ask_that_are_listed(sources: dict[str, bytes]) -> None:
    tenants = with_data(sources, TENANTS, {f"{ACME}/workloads": ["spiffe://example.org/typo"]})
    slip = f"tenant {ACME} lets spiffe://example.org/typo ask, which is not in data.workloads"

    def slips(files: dict[str, bytes]) -> list[str]:
        part = read_part(files, name="it", place="it", verifier=None)
        return [each.message for each in check_names(part.data, part.rego, files)]

    assert slips(tenants) == [], "while none is listed, a tenant may list whom it will"
    assert slip in slips(with_data(tenants, WORKLOADS, {"a": {"tools": ["orders.read"]}}))


def test_a_slip_in_the_names_is_found_by_a_whole_check(
    sources: dict[str, bytes], opa: Path
) -> None:
    files = with_data(sources, TENANTS, {f"{ACME}/roles/viewer": {"tools": ["orders.drop"]}})
    line = files[TENANTS].decode().split('"orders.drop"')[0].count("\n") + 1

    (finding,) = checked(files, opa).findings

    assert finding.place == f"{TENANTS}:{line}"


def test_names_of_other_conventions_are_left_alone(opa: Path) -> None:
    rego = {
        "pdp/authz/authz.rego": b'package pdp.authz\n\ndecision := {"allow": false,'
        b' "reason_code": "no"}\n',
        "pdp/budget/budget.rego": b'package pdp.budget\n\ndecision := {"allow": false,'
        b' "reason_code": "no"}\n\nlimits := []\n',
        "customers/data.json": b'{"acme": {"tools": ["x"]}}',
    }

    assert checked(rego, opa).findings == ()


def test_the_line_of_a_value_is_found_in_json_and_in_yaml() -> None:
    places = DataPlaces(
        {
            "tenants/data.json": b'{\n\t"acme": {\n\t\t"allowlist": [\n\t\t\t"a",\n\t\t\t"b"]}}',
            "tools/data.yaml": b"a:\n  scopes:\n    - one\n    - two\n",
            "x/y/data.json": b'{"z":\n1}',
            "README.md": b"tools:",
        }
    )

    assert places.find(("tenants", "acme", "allowlist", 1)) == ("tenants/data.json", 5)
    assert places.find(("tools", "a", "scopes", 1)) == ("tools/data.yaml", 4)
    assert places.find(("tools", "a", "missing")) == ("tools/data.yaml", 1)
    assert places.find(("x", "y", "z")) == ("x/y/data.json", 1)
    assert places.find(("nowhere",)) == ("", 0)


def test_a_file_that_yaml_can_not_read_is_named_without_a_line() -> None:
    places = DataPlaces({"tenants/data.json": b'{"acme": "\xff"}'})

    assert places.find(("tenants", "acme")) == ("tenants/data.json", 0)
