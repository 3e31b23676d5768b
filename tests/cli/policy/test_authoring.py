"""The commands of policy authors: what they print, and how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typer.testing import CliRunner, Result

from pdp.cli.policy import app
from pdp.cli.policy.authoring import FINDINGS_SHOWN

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ROOT / ".tools"
AUTHZ = "pdp/authz/authz.rego"


def pdp(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(autouse=True)
def _commands_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (TOOLS / "opa").exists():
        pytest.fail("there is no .tools/opa; `make test` installs it")
    monkeypatch.setenv("PATH", str(TOOLS))


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("authors") / "policy"
    assert pdp("init", directory).exit_code == 0
    return directory


@pytest.fixture
def policy(begun: Path, tmp_path: Path) -> Path:
    """A copy of what `init` writes, to be changed."""
    return shutil.copytree(begun, tmp_path / "policy")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with key.pem and public.pem."""
    folder = tmp_path_factory.mktemp("keys")
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pem").write_bytes(private)
    (folder / "public.pem").write_bytes(public)
    return folder


@pytest.fixture(scope="session")
def built(begun: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("built") / "bundle.tar.gz"
    done = pdp(
        *("build", begun, "--out", file, "--revision", "r-1", "--sequence", "1"),
        *("--signing-key", keys / "key.pem", "--key-id", "release", "--scope", "prod"),
        *("--opa", TOOLS / "opa"),
    )
    assert done.exit_code == 0, done.output
    return file


def change(policy: Path, name: str, old: str, new: str) -> None:
    file = policy / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def refused(done: Result) -> str:
    """What a command said on stderr that could not do its work: no traceback."""
    assert done.exit_code == 2
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


# init, fmt, schema


def test_init_names_what_it_wrote_and_what_to_read(tmp_path: Path) -> None:
    done = pdp("init", tmp_path / "new")

    assert done.exit_code == 0
    assert str(tmp_path / "new" / AUTHZ) in done.stdout.splitlines()
    assert done.stdout.endswith(f"Next: read {tmp_path / 'new' / 'README.md'}\n")


def test_init_leaves_a_directory_with_files_alone(begun: Path) -> None:
    assert "is there already, and not an empty directory" in refused(pdp("init", begun))


def test_init_says_where_it_can_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert "can not be used" in refused(pdp("init", tmp_path / "file" / "below"))


def test_fmt_formats_and_names_what_it_changed(policy: Path) -> None:
    assert pdp("fmt", "--check", policy).exit_code == 0
    change(policy, AUTHZ, "\tis_object(tool)", "    is_object(tool)")

    found = pdp("fmt", "--check", policy)
    assert (found.exit_code, found.stdout) == (1, f"{policy / AUTHZ}\n")
    assert "    is_object(tool)" in (policy / AUTHZ).read_text()

    done = pdp("fmt", policy)
    assert (done.exit_code, done.stdout) == (0, f"{policy / AUTHZ}\n")
    assert "\tis_object(tool)" in (policy / AUTHZ).read_text()


def test_fmt_says_what_it_can_not_parse(policy: Path) -> None:
    (policy / AUTHZ).write_text("package pdp.authz\n\nallow if {\n")

    assert "authz.rego:4: rego_parse_error" in refused(pdp("fmt", policy))
    assert "no such file" in refused(pdp("fmt", policy / "missing"))


def test_schemas_are_listed_and_printed() -> None:
    listed = pdp("schema").stdout.split()

    for name in listed:
        assert json.loads(pdp("schema", name).stdout)["$schema"].startswith("http://json-schema")
    assert "there are authz_decision, authz_input" in refused(pdp("schema", "nothing"))


# build, sign, verify


def test_a_release_is_built_signed_and_verified(built: Path, keys: Path) -> None:
    done = pdp(
        *("verify", built, "--public-key", keys / "public.pem", "--key-id", "release"),
        *("--scope", "prod"),
    )

    assert done.exit_code == 0, done.output
    assert "signed with release" in done.stdout
    assert "revision r-1" in done.stdout
    assert "sequence 1" in done.stdout
    assert "roots    pdp, prices, tenants, tools" in done.stdout
    assert "wasm     is what the Rego builds" in done.stdout


def test_verify_tells_machines_the_same(built: Path, keys: Path) -> None:
    done = pdp(
        *("verify", built, "--public-key", keys / "public.pem", "--key-id", "release"),
        *("--scope", "prod", "--output", "json"),
    )

    found = json.loads(done.stdout)
    assert found["good"] is True
    assert (found["revision"], found["sequence"], found["wasm"]) == ("r-1", 1, "same")
    assert ".signatures.json" in found["files"]


def test_a_release_for_another_scope_is_refused(built: Path, keys: Path) -> None:
    done = pdp(
        *("verify", built, "--public-key", keys / "public.pem", "--key-id", "release"),
        *("--scope", "test", "--output", "json"),
    )

    assert done.exit_code == 1
    assert "is signed for another scope" in done.stderr
    assert json.loads(done.stdout)["good"] is False


def test_build_says_what_it_built(policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "bundle.tar.gz"

    done = pdp("build", policy, "-o", file, "--sequence", "5", "--output", "json")

    found = json.loads(done.stdout)
    assert found["file"] == str(file)
    assert found["revision"].startswith("sha256:")
    assert (found["sequence"], found["key_id"]) == (5, None)
    assert "not signed" in pdp("build", policy, "-o", file).stdout


def test_by_default_each_build_has_a_later_sequence(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.9)

    done = pdp("build", policy, "-o", tmp_path / "bundle.tar.gz", "--output", "json")

    assert json.loads(done.stdout)["sequence"] == 1_800_000_000


def test_signing_writes_in_place_or_elsewhere(built: Path, keys: Path, tmp_path: Path) -> None:
    before, target = built.read_bytes(), tmp_path / "signed.tar.gz"

    done = pdp(
        *("sign", built, "--signing-key", keys / "key.pem", "--key-id", "other", "-o", target)
    )

    assert done.exit_code == 0, done.output
    assert built.read_bytes() == before
    verified = pdp(*("verify", target, "--public-key", keys / "public.pem", "--key-id", "other"))
    assert verified.exit_code == 0, verified.output

    again = pdp("sign", target, "--signing-key", keys / "key.pem", "--key-id", "third")
    assert again.exit_code == 0
    assert "signed with third" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["build", "missing", "-o", "x"], "missing can not be read: No such file"),
        (["build", "{policy}", "-o", "missing/x"], "missing/x can not be written: No such file"),
        (["build", "{policy}", "-o", "x", "--revision", "a b"], "has a revision in .manifest"),
        (["build", "{policy}", "-o", "x", "--key-id", "k"], "needs --signing-key too"),
        (["build", "{policy}", "-o", "x", "--signing-key", "{key}"], "is needed with --signing"),
        (["build", "{empty}", "-o", "x"], "holds no Rego to build"),
        (["fmt", "{empty}"], "it is no .rego file, and holds none"),
        (["fmt", "{key}"], "it is no .rego file, and holds none"),
        (["sign", "missing", "--signing-key", "{key}", "--key-id", "k"], "can not be read"),
        (["sign", "{key}", "--signing-key", "{key}", "--key-id", "k"], "not a whole .tar.gz"),
        (["sign", "{built}", "--signing-key", "missing", "--key-id", "k"], "missing can not be"),
        (
            ["sign", "{built}", "--signing-key", "{key}", "--key-id", "k", "--algorithm", "none"],
            "must be one of EdDSA, ES256",
        ),
        (
            ["sign", "{built}", "--signing-key", "{public}", "--key-id", "k"],
            "public.pem is no private key in PEM form",
        ),
        (["verify", "missing", "--public-key", "{public}", "--key-id", "k"], "can not be read"),
        (["verify", "{built}", "--public-key", "missing", "--key-id", "k"], "missing can not be"),
        (["verify", "{built}", "--public-key", "{key}", "--key-id", "k"], "is no public key"),
        (["check", "missing"], "missing can not be read: No such file"),
        (["test", "missing"], "missing can not be read: No such file"),
        (["test", "{policy}", "--opa", "missing"], "can not be run: No such file"),
        (["test", "{policy}", "--opa", "/bin/true"], "it said: nothing"),
        (["test", "{policy}", "--opa", "/bin/ls"], "A command did not do what it is there for"),
        (["check", "{policy}", "--opa", "/bin/false"], "A command did not do what it is there"),
        (["check", "{policy}", "--opa", "missing"], "can not be run: No such file"),
    ),
)
def test_what_can_not_be_used_is_told_in_a_line(
    policy: Path, keys: Path, built: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places: dict[str, Any] = {
        "policy": policy,
        "empty": tmp_path / "empty",
        "key": keys / "key.pem",
        "public": keys / "public.pem",
        "built": built,
    }

    said = refused(pdp(*(argument.format(**places) for argument in arguments)))

    flowing = " ".join(said.replace("│", " ").split())
    assert message in flowing


def test_rego_that_does_not_compile_is_not_built(policy: Path, tmp_path: Path) -> None:
    change(policy, AUTHZ, "\tis_object(tool)", "\tis_object(toolbox)")

    assert "authz.rego:" in refused(pdp("build", policy, "-o", tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_without_opa_it_is_said_how_to_get_it(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    for command in (["check"], ["test"], ["fmt"], ["build", "--out", policy / "x"]):
        assert "Install OPA 1.22 or newer" in refused(pdp(*command, policy))


def test_a_key_with_a_passphrase_is_told_from_one_that_is_broken(
    built: Path, tmp_path: Path
) -> None:
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    key = tmp_path / "key.pem"
    key.write_bytes(pem)

    said = refused(pdp("sign", built, "--signing-key", key, "--key-id", "k"))

    assert "has a passphrase" in " ".join(said.replace("│", " ").split())


# check


def test_a_sound_policy_passes_a_strict_check(policy: Path) -> None:
    done = pdp("check", "--strict", policy)

    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("answers held against the contract\n0 findings\n")


def test_an_error_fails_the_check_with_its_place(policy: Path) -> None:
    change(policy, AUTHZ, "input.action.name in tenant.allowlist", "input.acton == tenant")

    done = pdp("check", policy)

    assert done.exit_code == 1
    assert "pdp/authz/authz.rego:" in done.stdout
    assert "error: undefined ref: input.acton" in done.stdout


def test_a_warning_fails_only_a_strict_check(policy: Path) -> None:
    change(policy, "tenants/data.json", '{"tools": ["orders.read"]}', '{"tools": ["order.read"]}')

    done = pdp("check", policy)
    assert done.exit_code == 0
    assert (
        "tenants/data.json:10: warning: role viewer of tenant tenant_acme may use order.read,"
        " which is not in data.tools\n" in done.stdout
    )
    strict = pdp("check", "--strict", "--output", "json", policy)
    assert strict.exit_code == 1
    found = json.loads(strict.stdout)
    assert found["good"] is False
    assert found["findings"][0]["severity"] == "warning"
    assert (found["findings"][0]["file"], found["findings"][0]["line"]) == ("tenants/data.json", 10)


def test_a_hostile_name_does_not_steer_the_terminal(policy: Path) -> None:
    change(policy, "tenants/data.json", '"tenant_initech"', '"tenant_\\u001b[2J"')

    assert "\x1b" not in pdp("check", policy).stdout


def test_many_findings_are_counted_and_json_has_them_all(policy: Path) -> None:
    tenants = {f"t{number}": {"status": "Active"} for number in range(FINDINGS_SHOWN + 5)}
    (policy / "tenants" / "data.json").write_text(json.dumps(tenants))

    done = pdp("check", policy)

    shown = [line for line in done.stdout.splitlines() if ": warning: " in line]
    assert len(shown) == FINDINGS_SHOWN
    found = json.loads(pdp("check", policy, "--output", "json").stdout)["findings"]
    assert f"and {len(found) - len(shown)} more; --output json has them all" in done.stdout


# test


def test_tests_pass_in_both_engines_and_reach_every_line(policy: Path) -> None:
    done = pdp("test", policy, "--min-coverage", "100")

    assert done.exit_code == 0, done.output
    assert "100.0 % of the lines are tested" in done.stdout


def test_a_test_that_fails_is_named(policy: Path) -> None:
    name = "pdp/subject/subject_test.rego"
    change(policy, name, "package pdp.subject_test", "package pdp.subject_test\n\ntest_x if false")

    done = pdp("test", policy)

    assert done.exit_code == 1
    assert f"{name}:3: data.pdp.subject_test.test_x failed\n" in done.stdout
    assert "coverage was not measured" in done.stdout
    assert "To see which condition failed: opa test --bundle --var-values" in done.stdout


def test_too_few_lines_tested_is_a_failure(policy: Path) -> None:
    (policy / "pdp" / "budget" / "budget_test.rego").unlink()

    done = pdp("test", policy, "--min-coverage", "95")

    assert done.exit_code == 1
    assert "% of the lines are tested, less than 95 %" in done.stdout
    assert "pdp/budget/budget.rego: not lines " in done.stdout
    assert pdp("test", policy).exit_code == 0


def test_what_the_embedded_engine_does_not_run_is_named_and_no_failure(policy: Path) -> None:
    name = "pdp/subject/subject_test.rego"
    for file in policy.rglob("*_test.rego"):
        if file != policy / name:
            file.unlink()
    change(
        policy,
        name,
        "package pdp.subject_test",
        "package pdp.subject_test\n\ntest_x if opa.runtime()",
    )

    done = pdp("test", policy)

    assert done.exit_code == 0
    assert (
        f"{name}:3: data.pdp.subject_test.test_x was not run in the embedded engine: "
        in done.stdout
    )
    assert "opa.runtime" in done.stdout


def test_a_policy_without_tests_does_not_pass(policy: Path) -> None:
    for file in policy.rglob("*_test.rego"):
        file.unlink()

    done = pdp("test", policy)

    assert done.exit_code == 1
    assert "There are no tests" in done.stdout


def test_machines_read_how_each_test_went(begun: Path, built: Path) -> None:
    for path in (begun, built):
        found = json.loads(pdp("test", path, "--output", "json").stdout)

        assert found["good"] is True
        assert found["coverage"]["percent"] == 100
        assert {test["embedded"]["outcome"] for test in found["tests"]} == {"passed"}
