"""Rego is compiled by OPA, within bounds, or refused in OPA's words; releases are whole."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdp.canonical import JsonValue
from pdp.policy import compile as compile_module
from pdp.policy.archive import pack
from pdp.policy.bundle import Bundle, load_bundle
from pdp.policy.compile import build_files, compile_rego, find_opa
from pdp.policy.engine import REQUIRED_ENTRYPOINTS, BundleError, Entrypoint, PolicyError
from pdp.policy.part import read_part
from pdp.policy.wasm import WasmEvaluator
from tests.policy.bundles import ENTRYPOINTS, FILES, REGO, manifest, message_of

RULES = {name: content.decode() for name, content in REGO.items()}


def refusal_of(rego: dict[str, str], opa: Path | None) -> str:
    with pytest.raises(BundleError) as refusal:
        compile_rego(rego, b"{}", opa=opa)
    return message_of(refusal)


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    path.chmod(0o755)
    return path


def test_the_same_rego_compiles_to_the_same_wasm(opa: Path) -> None:
    one, two = (compile_rego(RULES, b"{}", opa=opa) for _ in range(2))

    assert one == two
    assert one.startswith(b"\x00asm")


def test_what_opa_quotes_of_the_rego_steers_no_terminal(opa: Path) -> None:
    message = refusal_of({"x.rego": "package x\n\nbad \x1b[2J\x9b \u202e rule {"}, opa)

    assert "rego_parse_error" in message
    assert all(character.isprintable() or character in "\n\t" for character in message)


def test_tests_are_not_compiled(opa: Path) -> None:
    with_tests = {**RULES, "pdp/authz/authz_test.rego": "package pdp.authz_test\n\nnot rego"}

    assert compile_rego(with_tests, b"{}", opa=opa) == compile_rego(RULES, b"{}", opa=opa)


def test_the_opa_on_path_is_used_when_none_is_given(
    opa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(opa.parent))

    assert find_opa(None) == opa
    assert compile_rego(RULES, b"{}", opa=None).startswith(b"\x00asm")


def test_without_opa_it_is_said_how_to_get_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    message = refusal_of(RULES, None)

    assert "Install OPA" in message
    assert "opa build -t wasm" in message
    for entrypoint in ENTRYPOINTS:
        assert f"-e {entrypoint}" in message


def test_rego_that_does_not_compile_says_where(opa: Path) -> None:
    message = refusal_of({**RULES, "pdp/x/x.rego": "package pdp.x\n\nallow := nope"}, opa)

    assert message.startswith("The policy does not compile:\n")
    assert "pdp/x/x.rego:3" in message
    assert "pdp-compile-" not in message


def test_rego_without_an_entrypoint_says_which(opa: Path) -> None:
    message = refusal_of({**RULES, "pdp/budget/budget.rego": "package pdp.budget\n"}, opa)

    assert "pdp/budget/decision" in message


@pytest.mark.parametrize(
    "rego",
    (
        'package pdp.sidecar\n\nservice_class := {"priority": "low"}',
        'package pdp.sidecar\n\nservice_class.priority := "low"',
        'package pdp.sidecar.service_class\n\npriority := "low"',
        'package pdp\n\nsidecar := {"service_class": {"priority": "low"}}',
        'package pdp\n\nsidecar[x] := {"priority": "low"} if some x in ["service_class"]',
    ),
)
def test_an_optional_rule_is_compiled_however_it_is_written(opa: Path, rego: str) -> None:
    assert asked_for_class({**RULES, "pdp/sidecar/sidecar.rego": rego}, opa) == {"priority": "low"}


@pytest.mark.parametrize(
    "rego",
    (
        "package pdp.other\n\nservice_class := 1",
        "package pdp.sidecar\n\nservice := 1",
        "package pdp.sidecar\n\nservice_class(x) := x",
        "package pdp.sidecar\n\nimport data.other.service_class",
    ),
)
def test_a_policy_without_the_optional_rule_compiles_and_gives_no_answer(
    opa: Path, rego: str
) -> None:
    assert asked_for_class({**RULES, "pdp/other.rego": rego}, opa) == "policy_undefined"
    tested = {**RULES, "pdp/sidecar_test.rego": "package pdp.sidecar\n\nservice_class := 1"}
    assert asked_for_class(tested, opa) == "policy_undefined"


def asked_for_class(rego: dict[str, str], opa: Path) -> JsonValue:
    bundle = Bundle(revision="r-1", data=b"{}", wasm=compile_rego(rego, b"{}", opa=opa))
    with WasmEvaluator(bundle) as evaluator:
        try:
            return evaluator.evaluate(Entrypoint.SERVICE_CLASS, {})
        except PolicyError as error:
            return error.reason_code


def test_an_opa_whose_syntax_trees_are_unknown_is_refused(opa: Path, tmp_path: Path) -> None:
    other = script(tmp_path / "opa", f'[ "$1" = parse ] && echo {{}} && exit; exec {opa} "$@"')
    message = refusal_of({**RULES, "pdp/sidecar.rego": "package pdp.sidecar\n\nx := 1"}, other)

    assert "does not say which rules it has" in message


def test_a_rule_where_data_stands_is_refused_as_an_opa_server_refuses_it(opa: Path) -> None:
    with pytest.raises(BundleError, match="conflicting rule for data path pdp/authz/decision"):
        compile_rego(RULES, b'{"pdp": {"authz": {"decision": {"allow": true}}}}', opa=opa)

    assert compile_rego(RULES, b'{"pdp": {"authz": {"more": 1}}}', opa=opa)


def test_no_host_is_asked_for_what_a_comment_points_to(opa: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        host.settimeout(0)
        url = f"http://127.0.0.1:{host.getsockname()[1]}/schema.json"
        asking = f'# METADATA\n# schemas:\n#   - input: {{"$ref": "{url}"}}\nallow := input.x\n'

        message = refusal_of({**RULES, "pdp/x/x.rego": f"package pdp.x\n\n{asking}"}, opa)

        assert "remote reference loading disabled" in message
        with pytest.raises(BlockingIOError):
            host.accept()


def test_no_rego_at_all_is_refused(opa: Path) -> None:
    assert refusal_of({"a_test.rego": "package a_test"}, opa) == (
        "The policy holds no Rego that could be compiled"
    )


def test_an_opa_that_does_not_run_is_a_plain_refusal(tmp_path: Path) -> None:
    assert refusal_of(RULES, tmp_path / "opa").startswith("The policy could not be compiled: ")


def test_an_opa_that_builds_something_else_is_refused(tmp_path: Path) -> None:
    quiet = script(tmp_path / "opa", 'if [ "$1" = capabilities ]; then echo "{}"; fi')
    silent = script(tmp_path / "silent", "exit 0")

    assert refusal_of(RULES, quiet).startswith("The policy could not be compiled: ")
    assert refusal_of(RULES, silent).endswith("opa does not say what it can do")


def test_an_opa_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "COMPILE_TIMEOUT_SECONDS", 0.2)
    started = time.monotonic()

    message = refusal_of(RULES, script(tmp_path / "opa", "exec sleep 60"))

    assert message == "The policy was not compiled within 0.2 seconds"
    assert time.monotonic() - started < 30


def test_what_opa_says_is_shown_within_bounds(tmp_path: Path) -> None:
    talker = script(tmp_path / "opa", "head -c 1000000 /dev/zero | tr '\\0' x", "exit 1")

    assert len(refusal_of(RULES, talker)) < 20_000


def test_opa_sees_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPA_BUILD_TARGET", "plan")
    monkeypatch.setenv("TOKEN", "hush")

    message = refusal_of(RULES, script(tmp_path / "opa", "env; exit 1"))

    assert "hush" not in message
    assert "OPA_" not in message


def test_other_rules_can_be_asked_for(opa: Path) -> None:
    rego = {"pdp/x/x.rego": "package pdp.x\n\ntest_it := true"}

    wasm = compile_rego(rego, b"{}", opa=opa, entrypoints=["pdp/x/test_it"])

    assert wasm.startswith(b"\x00asm")


def test_a_release_holds_the_rego_in_full_the_data_and_the_module(opa: Path) -> None:
    sources = {**FILES, "README.md": b"read me", "policy.wasm": b"old", ".signatures.json": b"{}"}

    built = build_files(sources, opa=opa, revision=None, sequence=None)

    assert built.keys() == {
        *(name for name in FILES if name.endswith(".rego")),
        "data.json",
        "policy.wasm",
        ".manifest",
    }
    assert all(built[name] == FILES[name] for name in FILES if name.endswith(".rego"))
    assert json.loads(built["data.json"]) == {
        "tenants": {"acme": {"status": "active", "limit": 1.5}}
    }
    assert json.loads(built[".manifest"]) == {
        "revision": "r-1",
        "roots": ["pdp", "tenants"],
        "rego_version": 1,
    }


def test_a_release_is_named_and_numbered_as_asked(opa: Path) -> None:
    metadata = {"owner": "platform", "pdp": {"sequence": 1}}
    sources = {**FILES, ".manifest": manifest(roots=["pdp", "tenants"], metadata=metadata)}

    built = build_files(sources, opa=opa, revision="2026.11", sequence=42)

    part = read_part(built, name="build", place="here", verifier=None)
    assert (part.manifest.revision, part.manifest.sequence) == ("2026.11", 42)
    assert json.loads(built[".manifest"])["metadata"] == {
        "owner": "platform",
        "pdp": {"sequence": 42},
    }


def test_the_same_sources_build_the_same_release(opa: Path) -> None:
    sources = {**FILES, ".manifest": b"{}"}

    one, two = (
        pack(build_files(files, opa=opa, revision=None, sequence=7))
        for files in (sources, dict(reversed(sources.items())))
    )

    assert one == two


@pytest.mark.parametrize(
    ("revision", "sequence", "complaint"),
    (("two words", None, "revision"), ("", -1, "sequence"), ("r" * 129, None, "revision")),
)
def test_a_release_is_not_named_or_numbered_wrongly(
    opa: Path, revision: str, sequence: int | None, complaint: str
) -> None:
    with pytest.raises(BundleError, match=complaint):
        build_files(FILES, opa=opa, revision=revision, sequence=sequence)


def test_both_engines_answer_alike_from_one_release(opa: Path, tmp_path: Path) -> None:
    """A real OPA, with or without a Wasm engine of its own, takes it as it is."""
    target = tmp_path / "bundle.tar.gz"
    target.write_bytes(pack(build_files(FILES, opa=opa, revision="r-7", sequence=3)))
    bundle = load_bundle(target)

    with WasmEvaluator(bundle) as evaluator:
        for entrypoint in REQUIRED_ENTRYPOINTS:
            rule = "data." + entrypoint.replace("/", ".")
            assert evaluated(opa, target, rule) == evaluator.evaluate(entrypoint, {})
    assert bundle.revision == "r-7"
    assert list(manifests_in(opa, target)) == [
        {
            "revision": "r-7",
            "roots": ["pdp", "tenants"],
            "rego_version": 1,
            "metadata": {"pdp": {"sequence": 3}},
        }
    ]


def manifests_in(opa: Path, bundle: Path) -> Iterator[object]:
    """What OPA itself has of each bundle that it has loaded."""
    loaded = evaluated(opa, bundle, "data.system.bundles")
    assert isinstance(loaded, dict)
    for one in loaded.values():
        yield one["manifest"]


def evaluated(opa: Path, bundle: Path, query: str) -> object:
    done = subprocess.run(
        [opa, "eval", "--format", "json", "--bundle", bundle, query],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["result"][0]["expressions"][0]["value"]
