"""Where keys are from is said once for each issuer, and no two issuers' actors are mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdp.config import ConfigError, JwtIdentity, JwtIssuer, load_config

FILE = {"jwks_file": "/etc/pdp/jwks.json"}


def write(directory: Path, *issuers: dict[str, Any]) -> Path:
    usual = {"issuer": "https://id.example", "audiences": ["agent-service"]}
    file = directory / "pdp.yaml"
    file.write_text(
        json.dumps(  # which is YAML too
            {
                "state_dir": "state",
                "policy": {"bundle": "bundle.tar.gz"},
                "identity": {"mode": "jwt", "issuers": [{**usual, **each} for each in issuers]},
            },
            indent=1,
        )
    )
    return file


def load(directory: Path, *issuers: dict[str, Any]) -> list[JwtIssuer]:
    identity = load_config(write(directory, *issuers), {}).identity
    assert isinstance(identity, JwtIdentity)
    return identity.issuers


def fault(directory: Path, *issuers: dict[str, Any]) -> str:
    file = write(directory, *issuers)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    return caught.value.message.replace(str(file), "pdp.yaml")


@pytest.mark.parametrize(
    ("keys", "seconds"),
    (
        (FILE, 1),
        ({"jwks_url": "https://id.example/jwks.json"}, 300),
        ({"jwks_url": "http://127.0.0.1:8080/jwks.json"}, 300),
        ({"discovery": True}, 300),
        ({"discovery": True, "ca_file": "/etc/pdp/ca.pem", "poll_seconds": 60}, 60),
        ({"discovery": True, "bearer_token_file": "/var/run/token"}, 300),
        ({"issuer": "spiffe://example.org", "workload_api": "unix:///run/agent.sock"}, 60),
    ),
)
def test_keys_are_from_one_place(keys: dict[str, Any], seconds: float, tmp_path: Path) -> None:
    [issuer] = load(tmp_path, keys)
    assert issuer.seconds_between_looks == seconds


ONE_OF = "set exactly one of jwks_file, jwks_url, discovery and workload_api"


@pytest.mark.parametrize(
    ("keys", "problem"),
    (
        ({}, ONE_OF),
        ({"discovery": False}, ONE_OF),
        ({**FILE, "jwks_url": "https://id.example/jwks.json"}, ONE_OF),
        ({**FILE, "discovery": True}, ONE_OF),
        ({"discovery": True, "jwks_url": "https://id.example/jwks.json"}, ONE_OF),
        (
            {"workload_api": "unix:///a", "discovery": True, "issuer": "spiffe://example.org"},
            ONE_OF,
        ),
        ({"jwks_uri": "https://id.example/jwks.json"}, "unknown key; did you mean jwks_url?"),
        ({"discover": True}, "unknown key; did you mean discovery?"),
        ({"jwks_url": "ftp://id.example/jwks.json"}, "jwks_url: expected a text that matches ^"),
        ({"jwks_url": "https://user:pw@id.example/"}, "jwks_url: expected a text that matches ^"),
        ({"jwks_url": "file:///etc/passwd"}, "jwks_url: expected a text that matches ^"),
        ({"jwks_url": "http://id.example/jwks.json"}, "plain http is allowed only to loopback"),
        ({"discovery": True, "issuer": "http://id.example"}, "plain http is allowed only"),
        ({"discovery": True, "issuer": "id.example"}, "discovery needs an issuer that is a URL"),
        ({"discovery": True, "issuer": "https://a.example/?x=1"}, "discovery needs an issuer"),
        ({"discovery": True, "issuer": "https://a.example/#x"}, "discovery needs an issuer"),
        ({"discovery": True, "issuer": "https://u@a.example"}, "discovery needs an issuer"),
        ({"workload_api": "unix:///a"}, "workload_api is for the keys of a trust domain"),
        ({"workload_api": "/run/agent.sock"}, "workload_api: expected a text that matches ^"),
        ({"workload_api": "tcp://127.0.0.1:8081"}, "workload_api: expected a text that matches ^"),
        ({**FILE, "ca_file": "/etc/pdp/ca.pem"}, "ca_file goes with jwks_url or discovery"),
        ({**FILE, "bearer_token_file": "/t"}, "bearer_token_file goes with jwks_url or discovery"),
        ({"discovery": True, "poll_seconds": 0.5}, "poll_seconds: expected a number from 1 to"),
        ({"discovery": True, "max_age_seconds": 599}, "must be at least twice poll_seconds"),
        (
            {**FILE, "max_age_seconds": 604_801},
            "max_age_seconds: expected an integer from 2 to 604800",
        ),
    ),
)
def test_a_place_that_makes_no_sense_is_refused_with_its_line(
    keys: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    message = fault(tmp_path, keys)
    assert problem in message
    assert message.startswith("pdp.yaml:")
    assert "identity.issuers.0" in message


def test_a_trust_domain_is_one_of_users_or_of_workloads(tmp_path: Path) -> None:
    file = write(tmp_path, {"issuer": "spiffe://example.org", **FILE})
    document = json.loads(file.read_text())
    workloads = {"trust_domain": "example.org", "audiences": ["pdp"], **FILE}
    document["identity"]["workload"] = {"issuers": [workloads]}
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is an issuer of users and of workloads"):
        load_config(file, {})
    workloads = {"issuer": "spiffe://example.org", "audiences": ["pdp"], **FILE}
    document["identity"]["issuers"][0]["issuer"] = "https://id.example"
    document["identity"]["workload"]["issuers"].append(workloads)
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="two issuers have the same issuer"):
        load_config(file, {})


OTHER = {"issuer": "https://other.example", **FILE}


def tenants(*names: str) -> dict[str, Any]:
    return {"tenant": {"tenants": list(names)}}


@pytest.mark.parametrize(
    ("one", "other"),
    (
        ({}, {}),
        ({"actor_prefix": "okta:"}, {"actor_prefix": "okta:"}),
        # The actor okta:ann of the one is the actor ann of the other.
        ({}, {"actor_prefix": "okta:"}),
        ({"actor_prefix": "okta:"}, {"actor_prefix": "okta:eu:"}),
        ({"shared_actors": True}, {}),
        ({"tenant": {"fixed": "tenant_acme"}}, {}),
        ({"tenant": {"fixed": "tenant_acme"}}, {"tenant": {"fixed": "tenant_acme"}}),
        ({"tenant": {"fixed": "tenant_acme"}}, tenants("tenant_acme", "tenant_globex")),
        (
            {"tenant": {"organisations": {"org-1": "tenant_acme"}}},
            {"tenant": {"organisations": {"org-2": "tenant_acme"}}},
        ),
        (
            {"tenant": {"organisations": {"org-1": "tenant_acme"}}},
            {"tenant": {"organisations_file": "organisations.json"}},
        ),
    ),
)
def test_two_issuers_that_can_name_the_same_actor_are_refused(
    one: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    message = fault(tmp_path, {**FILE, **one}, {**OTHER, **other})
    assert "https://id.example and https://other.example can name the same actor" in message
    assert "actor_prefix" in message
    assert "shared_actors" in message


@pytest.mark.parametrize(
    ("one", "other"),
    (
        ({"actor_prefix": "okta:"}, {"actor_prefix": "entra:"}),
        ({"shared_actors": True}, {"shared_actors": True}),
        ({"tenant": {"fixed": "tenant_acme"}}, {"tenant": {"fixed": "tenant_globex"}}),
        (tenants("tenant_acme"), tenants("tenant_globex", "tenant_initech")),
        (
            {"tenant": {"organisations": {"org-1": "tenant_acme"}}},
            {"tenant": {"organisations": {"org-1": "tenant_globex"}}},
        ),
        ({"tenant": {"organisations": {"a": "tenant_acme"}}}, tenants("tenant_globex")),
    ),
)
def test_issuers_whose_actors_are_apart_are_trusted_together(
    one: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    assert len(load(tmp_path, {**FILE, **one}, {**OTHER, **other})) == 2


@pytest.mark.parametrize("prefix", ("a b", "a\n", "é", "x" * 65))
def test_a_prefix_is_short_and_plain(prefix: str, tmp_path: Path) -> None:
    assert "actor_prefix: expected a text that matches ^[!-~]{0,64}$" in fault(
        tmp_path, {**FILE, "actor_prefix": prefix}
    )
