"""The configuration is read once; what is wrong in it is named by file, line and key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdp.config import ConfigError, load_config
from pdp.config_reference import json_schema
from pdp.storage import Durability
from scripts.generate_docs import PAGES

GOOD = """\
state_dir: state
identity:
  mode: jwt
  issuers:
    - issuer: https://id.example
      audiences: [agent-service]
      jwks_file: keys/jwks.json
policy:
  bundle: /etc/pdp/bundle.tar.gz
"""
ROOT = Path(__file__).resolve().parent.parent


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "pdp.yaml"
    file.write_text(text)
    return file


def faults(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> list[str]:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, environment or {})
    return caught.value.message.replace(str(file), "pdp.yaml").splitlines()


def test_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), {})
    assert config.listen.unix == Path("/run/pdp/pdp.sock")
    assert config.budget.durability is Durability.PROCESS


def test_relative_paths_are_taken_from_the_files_directory(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), {})
    assert config.state_dir == tmp_path / "state"
    assert config.identity.mode == "jwt"
    assert config.identity.issuers[0].jwks_file == tmp_path / "keys" / "jwks.json"
    assert config.policy.bundle == Path("/etc/pdp/bundle.tar.gz")


def test_the_environment_lies_over_the_file(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD),
        {
            "PDP_STATE_DIR": "/elsewhere",
            "PDP_LISTEN__UNIX": "null",
            "PDP_LISTEN__TCP__ADDRESS": "127.0.0.1:8443",
            "PDP_BUDGET__DURABILITY": "power",
            "HOME": "/root",
        },
    )
    assert config.state_dir == Path("/elsewhere")
    assert config.listen.unix is None
    assert config.listen.tcp is not None
    assert config.budget.durability is Durability.POWER


def test_what_kubernetes_sets_for_a_service_named_pdp_is_passed_over(tmp_path: Path) -> None:
    environment = {
        "PDP_SERVICE_HOST": "10.0.0.1",
        "PDP_SERVICE_PORT": "9464",
        "PDP_PORT": "tcp://10.0.0.1:9464",
        "PDP_PORT_9464_TCP_ADDR": "10.0.0.1",
    }
    load_config(write(tmp_path, GOOD), environment)


@pytest.mark.parametrize(
    ("text", "fault"),
    (
        (GOOD + "listn: {}\n", "pdp.yaml:10: listn: unknown key; did you mean listen?"),
        (
            GOOD + "limits:\n  call_timeout_second: 5\n",
            (
                "pdp.yaml:11: limits.call_timeout_second: unknown key;"
                " did you mean call_timeout_seconds?"
            ),
        ),
        (
            GOOD.replace("jwks_file", "jwks_fil"),
            "pdp.yaml:7: identity.issuers.0.jwks_fil: unknown key; did you mean jwks_file?",
        ),
        (
            GOOD + "limits: {call_timeout_seconds: '5'}\n",
            "pdp.yaml:10: limits.call_timeout_seconds: expected a number over 0 to 60, got a text",
        ),
        (
            GOOD + "permit: {ttl_seconds: 0}\n",
            "pdp.yaml:10: permit.ttl_seconds: expected an integer from 1 to 3600",
        ),
        (
            GOOD + "budget: {durability: maybe}\n",
            "pdp.yaml:10: budget.durability: expected process or power",
        ),
        (
            GOOD.replace("mode: jwt", "mode: trust_me"),
            "pdp.yaml:3: identity.mode: expected jwt or single_tenant",
        ),
        (
            GOOD.replace("  bundle: /etc/pdp/bundle.tar.gz", "  {}"),
            "policy: set either bundle or bundles",
        ),
        (
            GOOD.replace(
                "      jwks_file",
                "      organisation_claim: org\n"
                "      tenant: {organisations: {org-1: tenant_acme}}\n"
                "      jwks_file",
            ),
            "issuers.0: organisation_claim can not stand beside tenant.organisations",
        ),
        (
            GOOD.replace(
                "      jwks_file",
                f"      tenant: {{organisations: {{{'o' * 129}: tenant_acme}}}}\n      jwks_file",
            ),
            "an organisation id is longer than 128 characters",
        ),
        (GOOD + "listen: {unix_mode: '0666'}\n", "must be an octal mode without access for others"),
        (GOOD + "listen: {unix: null}\n", "set unix or tcp, or nobody can ask"),
        (GOOD + "listen: {metrics: '9464'}\n", "must be HOST:PORT"),
        (
            GOOD + "listen: {tcp: {address: '0.0.0.0:8443'}}\n",
            "plain TCP is allowed only on loopback; set tls",
        ),
        (
            GOOD + "permit: {ttl_seconds: 600}\n",
            "budget.hold_ttl_seconds must be at least permit.ttl_seconds",
        ),
        (GOOD + "state_dir: other\n", "pdp.yaml:10: a key stands twice"),
        (
            GOOD.replace("bundle: /etc/pdp/bundle.tar.gz", "bundles: {a: {pth: x}}"),
            "policy.bundles.a.pth: unknown key; did you mean path?",
        ),
        (
            GOOD.replace(
                "bundle: /etc/pdp/bundle.tar.gz", "bundles: {a: {path: x, oci: {image: r/a}}}"
            ),
            "policy.bundles.a: set exactly one of path, http and oci",
        ),
        (
            GOOD.replace(
                "bundle: /etc/pdp/bundle.tar.gz", "bundles: {a: {http: {url: 'http://x.example'}}}"
            ),
            "policy.bundles.a.http: plain http is allowed only to loopback; use https",
        ),
        (
            GOOD + "budget: {store: {addreses: ['redis:6379']}}\n",
            "budget.store.addreses: unknown key; did you mean addresses?",
        ),
        (
            GOOD + "budget: {store: {unix: /run/redis.sock, timeout_ms: 1}}\n",
            "budget.store.timeout_ms: expected an integer from 50 to 30000",
        ),
        (
            GOOD + "budget: {store: {addresses: ['a:1', 'b:2']}}\n",
            "budget.store: several addresses need cluster or sentinel",
        ),
        (
            GOOD.replace("bundle: /etc/pdp/bundle.tar.gz", "engine: {opa: {managd: true}}"),
            "policy.engine.opa.managd: unknown key; did you mean managed?",
        ),
        (GOOD + "instance: &a x\npermit: *a\n", "aliases are not used here"),
        ("- a\n", "expected keys such as identity and policy"),
        ("", "identity: is required"),
        ("a: [\n", "pdp.yaml:2: "),
        (
            GOOD.replace("state_dir: state", "state_dir: ~nobody-knows/s"),
            "state_dir: begins with the home directory",
        ),
        ("a: \0\n", "pdp.yaml: is not YAML"),
        ("a: !!timestamp x\n", "pdp.yaml: is not YAML"),
        ("a: !b\n", "the tag: put a value that begins with *, & or ! in quotes"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
    ),
)
def test_a_wrong_configuration_is_refused_with_its_place(
    tmp_path: Path, text: str, fault: str
) -> None:
    assert any(fault in line for line in faults(tmp_path, text)), faults(tmp_path, text)


def test_a_wrong_engine_section_is_one_fault(tmp_path: Path) -> None:
    text = GOOD.replace("bundle: /etc/pdp/bundle.tar.gz", "engine: {opa: {managd: true}}")
    assert len(faults(tmp_path, text)) == 1


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    found = faults(tmp_path, GOOD + "listn: {}\nlimts: {}\n", {"PDP_AUDIT__DURABILTY": "power"})
    assert len(found) == 3
    assert "PDP_AUDIT__DURABILTY: audit.durabilty: unknown key; did you mean durability?" in found


def test_single_tenant_mode_is_only_for_this_machine(tmp_path: Path) -> None:
    text = "identity: {mode: single_tenant}\npolicy: {bundle: b}\n"
    load_config(write(tmp_path, text), {})
    tls = "{address: '0.0.0.0:8443', tls: {certificate_file: c, key_file: k}}"
    (fault,) = faults(tmp_path, f"{text}listen: {{tcp: {tls}}}\n")
    assert "must be loopback" in fault


@pytest.mark.parametrize(
    "line",
    (
        "permit: {key_file: !s3cret-word}",
        "permit: {key_file: !s3cret!word}",
        "permit: {key_file: !<s3cret-word> x}",
        "permit: {key_file: *s3cret-word}",
        "permit: {key_file: &s3cret-word x, issuer: &s3cret-word y}",
        "budget: {durability: s3cret-word}",
        "budget: {store: s3cret-word}",
        "budget: {store: {addresses: ['u:s3cret-word@redis.example:6379']}}",
        "delegation: {max_depth: s3cret-word}",
    ),
)
def test_what_stands_where_it_is_wrong_is_not_repeated(tmp_path: Path, line: str) -> None:
    """It may be a password that was put into the wrong place, or not in quotes."""
    found = faults(tmp_path, f"{GOOD}{line}\n")
    assert found
    assert "s3cret" not in " ".join(found)
    mode = faults(tmp_path, GOOD.replace("mode: jwt", "mode: s3cret-word"))
    assert "s3cret" not in " ".join(mode)


@pytest.mark.parametrize("text", ("{", "!!timestamp x", "2001-99-99", "[" * 2_000))
def test_a_variable_that_is_no_yaml_is_named(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, GOOD, {"PDP_STATE_DIR": text})
    assert fault == "PDP_STATE_DIR: its value is not YAML"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: can not be read: No such file"):
        load_config(tmp_path / "absent.yaml", {})


def test_an_endless_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is larger than"):
        load_config(write(tmp_path, "#" * 1_100_000), {})


def test_the_command_exits_with_2_and_says_why_on_stderr(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "listn: {}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pdp", "serve", "--config", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{file}:10: listn: unknown key; did you mean listen?\n"


def test_the_schema_describes_every_key(tmp_path: Path) -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        for key, member in section.get("properties", {}).items():
            assert member["description"], key
    done = subprocess.run(
        [sys.executable, "-m", "pdp", "config", "schema"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == schema


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run `make docs`"


def test_the_example_of_the_page_is_accepted(tmp_path: Path) -> None:
    yaml.safe_load(GOOD)
    load_config(write(tmp_path, GOOD), {})


def test_permits_are_bound_only_where_certificates_are_asked_for(tmp_path: Path) -> None:
    tls = "certificate_file: c, key_file: k"
    listen = "listen: {{tcp: {{address: '0.0.0.0:8443', tls: {{{}}}}}}}\n"
    bound = GOOD + "permit: {bind_to_certificate: true}\n"
    for text in (bound, bound + listen.format(tls)):
        (fault,) = faults(tmp_path, text)
        assert fault.endswith(
            "permit.bind_to_certificate needs a listener with tls.client_ca_file"
        ), fault
    config = load_config(write(tmp_path, bound + listen.format(tls + ", client_ca_file: ca")), {})
    assert config.permit.bind_to_certificate
    assert not load_config(write(tmp_path, GOOD), {}).permit.bind_to_certificate
