"""An identity provider rotates its keys, goes down and comes back, and no sidecar restarts."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.testing import Caller, SidecarProcess, TokenIssuer, refusal_of
from tests.e2e.operating import records, soon
from tests.identity.identity_provider import IdentityProvider, down
from tests.policy.sources.servers import web_server

BUNDLE = Path(__file__).resolve().parents[2] / "policies" / "bundle.tar.gz"
LOOK_OFTEN = {"poll_seconds": 1, "max_age_seconds": 3}


@contextmanager
def sidecar_of(
    directory: Path, *issuers: dict[str, Any], issuer: TokenIssuer
) -> Iterator[SidecarProcess]:
    """A sidecar that trusts these issuers, besides what the usual configuration says."""
    config = {
        "identity": {
            "mode": "jwt",
            "issuers": [{"audiences": ["agent-service"], **each} for each in issuers],
        },
        "listen": {"metrics": "127.0.0.1:0"},
    }
    with SidecarProcess(directory, issuer=issuer, bundle=BUNDLE, config=config) as sidecar:
        yield sidecar


def address_of(sidecar: SidecarProcess) -> str:
    [address] = re.findall(r"serving on .*(http://127\.0\.0\.1:\d+)", sidecar.log.read_text())
    return str(address)


def page(sidecar: SidecarProcess, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address_of(sidecar) + path, timeout=10) as response:  # noqa: S310 - loopback
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def refused_status(sidecar: SidecarProcess) -> str:
    """What `pdp status` says where not all is well."""
    words = [sys.executable, "-m", "pdp", "status", "--url", address_of(sidecar)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    return ran.stdout


def issued_by(address: str, kid: str) -> TokenIssuer:
    return TokenIssuer(f"http://{address}", kid=kid)


def token(issuer: TokenIssuer) -> str:
    return issuer.token(
        "tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:read", "orders:write"]
    )


def outcome(sidecar: SidecarProcess, token: str) -> str:
    """The reason code of a call with this token."""
    codes = []
    with Caller(sidecar.target, token=token) as caller:

        def ask() -> None:
            codes.append(caller.authorize("orders.read", {"order_id": "918"}).reason_code)

        try:
            return refusal_of(ask).reason_code
        except AssertionError:  # it was not refused
            return codes[0]


def test_an_identity_provider_rotates_its_keys_while_the_sidecar_serves(tmp_path: Path) -> None:
    idp = IdentityProvider()
    with web_server(idp.handle) as address:
        old, new = issued_by(address, "old"), issued_by(address, "new")
        idp.publish(old)
        with sidecar_of(
            tmp_path, {"issuer": old.issuer, "discovery": True, **LOOK_OFTEN}, issuer=old
        ) as sidecar:
            old_token, new_token = token(old), token(new)
            assert outcome(sidecar, old_token) == "ok"
            assert outcome(sidecar, new_token) == "token_invalid"
            idp.publish(old, new)
            assert soon(lambda: outcome(sidecar, new_token) == "ok")
            assert outcome(sidecar, old_token) == "ok"
            idp.publish(new)
            assert soon(lambda: outcome(sidecar, old_token) == "token_invalid")
            assert outcome(sidecar, new_token) == "ok"
            _, metrics = page(sidecar, "/metrics")
            assert f'pdp_key_fetches_total{{issuer="{old.issuer}",result="ok"}}' in metrics
            assert re.search(rf'pdp_keys_age_seconds{{issuer="{old.issuer}"}} [0-9.]+\n', metrics)
    assert old_token not in sidecar.log.read_text()


@pytest.mark.slow
def test_a_sidecar_starts_while_its_identity_provider_is_down_and_lets_nobody_in(
    tmp_path: Path,
) -> None:
    idp = IdentityProvider()
    idp.behaviour = down
    with web_server(idp.handle) as address:
        issuer = issued_by(address, "key")
        idp.publish(issuer)
        url = {"issuer": issuer.issuer, "jwks_url": f"http://{address}/jwks.json", **LOOK_OFTEN}
        with sidecar_of(tmp_path, url, issuer=issuer) as sidecar:
            assert page(sidecar, "/readyz")[0] == 503
            told = refused_status(sidecar)
            assert f"issuer {issuer.issuer}: there are no keys; its tokens are refused" in told
            assert "check the server (status 503)" in told
            with Caller(sidecar.target, token=token(issuer)) as caller:
                refused = refusal_of(caller.authorize, "orders.read", {"order_id": "918"})
            assert refused.status is grpc.StatusCode.UNAVAILABLE
            assert refused.reason_code == "keys_unavailable"
            [record] = [each for each in records(sidecar) if each.get("action") == "orders.read"]
            assert (record["outcome"], record["reason_code"]) == ("denied", "keys_unavailable")
            assert record["tenant_id"] is None

            idp.behaviour = None
            assert soon(lambda: outcome(sidecar, token(issuer)) == "ok")
            assert soon(lambda: page(sidecar, "/readyz")[0] == 200)

            # A short outage is not felt; past max_age_seconds nobody is let in any more.
            idp.behaviour = down
            assert outcome(sidecar, token(issuer)) == "ok"
            assert soon(lambda: outcome(sidecar, token(issuer)) == "keys_unavailable")
            assert soon(lambda: page(sidecar, "/readyz")[0] == 503)
            idp.behaviour = None
            assert soon(lambda: outcome(sidecar, token(issuer)) == "ok")


@pytest.mark.slow
def test_an_issuer_that_is_down_takes_nothing_from_the_users_of_another(tmp_path: Path) -> None:
    theirs = IdentityProvider()
    theirs.behaviour = down
    with web_server(theirs.handle) as address:
        ours, other = TokenIssuer(kid="ours"), issued_by(address, "theirs")
        file = ours.write_jwks(tmp_path / "ours.json")
        with sidecar_of(
            tmp_path,
            {"issuer": ours.issuer, "jwks_file": str(file), "actor_prefix": "ours:"},
            {"issuer": other.issuer, "discovery": True, "actor_prefix": "theirs:", **LOOK_OFTEN},
            issuer=ours,
        ) as sidecar:
            assert outcome(sidecar, token(ours)) == "ok"
            assert outcome(sidecar, token(other)) == "keys_unavailable"
            assert page(sidecar, "/readyz")[0] == 200
            theirs.publish(other)
            theirs.behaviour = None
            assert soon(lambda: outcome(sidecar, token(other)) == "ok")
            actors = {each["actor_id"] for each in records(sidecar) if each.get("actor_id")}
            assert {"ours:user-7", "theirs:user-7"} <= actors

            # A key set that is mounted anew counts without a restart as well.
            following = TokenIssuer(kid="following")
            following.write_jwks(file)
            assert soon(lambda: outcome(sidecar, token(following)) == "ok")
            assert outcome(sidecar, token(ours)) == "token_invalid"


def test_a_sidecar_does_not_start_with_a_key_file_that_is_of_no_use(tmp_path: Path) -> None:
    issuer = TokenIssuer()
    sidecar = SidecarProcess(tmp_path, issuer=issuer, bundle=BUNDLE)
    (tmp_path / "jwks.json").write_text('{"keys": []}')
    with pytest.raises(RuntimeError, match=r"The key set .*/jwks\.json holds no signing key"):
        sidecar.start()
    sidecar.close()
