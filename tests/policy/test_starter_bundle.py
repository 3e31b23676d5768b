"""What stands in policies/ is tested, tidy, and what the built bundle was built of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdp.policy.bundle import Bundle, content_revision, load_bundle
from pdp.policy.verdict import parse_limits

ROOT = Path(__file__).resolve().parent.parent.parent
POLICIES = ROOT / "policies"


@pytest.mark.parametrize(
    "arguments",
    (
        ("test", "--bundle", "policies"),
        ("check", "--strict", "--bundle", "policies"),
        ("fmt", "--fail", "--list", "policies"),
    ),
    ids=lambda arguments: arguments[0],
)
def test_opa_finds_nothing_wrong(opa: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [opa, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_built_bundle_is_current(opa: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/build_policies.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_file_has_tests_beside_it() -> None:
    rules = {path for path in POLICIES.rglob("*.rego") if not path.name.endswith("_test.rego")}
    assert rules
    for path in rules:
        assert path.with_name(f"{path.stem}_test.rego").exists(), path


def test_the_built_bundle_holds_no_tests_and_names_its_content(starter: Bundle) -> None:
    assert not [name for name in starter.rego if name.endswith("_test.rego")]
    assert starter.revision == content_revision(starter.wasm, starter.data)


def test_the_sources_compiled_at_load_are_the_built_bundle(opa: Path, starter: Bundle) -> None:
    compiled = load_bundle(POLICIES, opa=opa)
    assert (compiled.revision, compiled.wasm, compiled.data) == (
        starter.revision,
        starter.wasm,
        starter.data,
    )


def test_every_limit_in_the_data_is_well_formed_and_covers_what_tools_charge() -> None:
    tenants = json.loads((POLICIES / "tenants" / "data.json").read_text())
    tools = json.loads((POLICIES / "tools" / "data.json").read_text())
    for name, tenant in tenants.items():
        limited = {(limit.budget, limit.unit) for limit in parse_limits(tenant["limits"])}
        charged = {
            (charge["budget"], charge["unit"])
            for tool in tenant["allowlist"]
            for charge in tools[tool].get("charge", [])
        }
        granted = {
            (budget, unit)
            for role in tenant["roles"].values()
            for budget, units in role.get("budgets", {}).items()
            for unit in units
        }
        assert charged | granted <= limited, name
