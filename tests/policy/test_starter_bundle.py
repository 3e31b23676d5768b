"""The starter bundle is tested, formatted, strict, and built from what stands beside it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdp.policy.bundle import Bundle, load_bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.verdict import parse_limits
from pdp.policy.wasm import WasmEngine

ROOT = Path(__file__).resolve().parent.parent.parent
POLICIES = ROOT / "policies"


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_rego_tests_pass(opa: Path) -> None:
    results = json.loads(run(opa, "test", "--bundle", "--format", "json", "policies"))

    assert len(results) >= 25


def test_its_rego_tests_reach_every_line(opa: Path) -> None:
    report = json.loads(run(opa, "test", "--bundle", "--coverage", "policies"))

    missed = {
        file: lines["not_covered"]
        for file, lines in report["files"].items()
        if "not_covered" in lines
    }
    assert missed == {}


def test_its_rego_is_formatted(opa: Path) -> None:
    assert run(opa, "fmt", "--fail", "--list", "policies") == ""


def test_its_rego_is_strict(opa: Path) -> None:
    run(opa, "check", "--strict", "--bundle", "policies")


@pytest.mark.parametrize("file", sorted(POLICIES.glob("pdp/**/*.rego")), ids=lambda file: file.name)
def test_every_file_has_tests_beside_it_and_a_package_of_its_folder(file: Path) -> None:
    package = ".".join(file.parent.relative_to(POLICIES).parts)
    rego = file.read_text(encoding="utf-8")

    if file.name.endswith("_test.rego"):
        assert f"package {package}_test\n" in rego
    else:
        assert f"package {package}\n" in rego
        assert file.with_name(f"{file.stem}_test.rego").exists()


def test_each_entrypoint_is_annotated(opa: Path) -> None:
    annotated = json.loads(run(opa, "inspect", "--annotations", "--format", "json", "policies"))

    entrypoints = {
        "/".join(part["value"] for part in annotation["path"][1:])
        for annotation in annotated["annotations"]
        if annotation["annotations"].get("entrypoint")
    }
    assert entrypoints == {entrypoint.value for entrypoint in Entrypoint}


def test_the_built_bundle_is_current(opa: Path) -> None:
    printed = run(sys.executable, "scripts/build_policies.py", "--check")

    assert "is current" in printed


def test_the_same_sources_build_the_same_bytes(opa: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import build_policies as b;"
        "Path(sys.argv[1]).write_bytes(b.pack(b.build()))"
    )

    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / name], cwd=ROOT / "scripts", check=True
        )

    # Not compared with the file that is kept: another zlib packs the same content otherwise.
    assert tmp_path.joinpath("one").read_bytes() == tmp_path.joinpath("two").read_bytes()


def test_the_sources_compiled_at_load_are_the_built_bundle(opa: Path, starter: Bundle) -> None:
    compiled = load_bundle(POLICIES, opa=opa)

    assert (compiled.revision, compiled.wasm, compiled.data) == (
        starter.revision,
        starter.wasm,
        starter.data,
    )


def test_a_limit_covers_whatever_a_tool_or_a_role_charges() -> None:
    tenants = json.loads(POLICIES.joinpath("tenants", "data.json").read_text())
    tools = json.loads(POLICIES.joinpath("tools", "data.json").read_text())

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


def test_the_built_bundle_needs_nothing_that_the_embedded_engine_lacks(starter: Bundle) -> None:
    engine = WasmEngine(starter, deadline_ms=1_000, workers=1, memory_max_mib=64)

    assert engine.revision == starter.revision
    assert starter.revision.startswith("sha256:")
    asyncio.run(engine.close())
