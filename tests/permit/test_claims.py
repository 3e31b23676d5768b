"""What a permit says survives being signed and read, up to each bound and not beyond."""

from __future__ import annotations

from typing import Any

import pytest

from pdp.canonical import JsonObject
from pdp.permit import Permit, PermitError, jws
from pdp.permit.claims import MAX_AGENTS, MAX_DELEGATIONS, MAX_USES, from_claims
from tests.permit.test_permit import ARGUMENTS, KEY, permit, token, verifier

EVERYTHING: dict[str, Any] = {
    "scopes": ("orders:read", "orders:write"),
    "agents": ("planner", "worker", "helper"),
    "delegations": ("token-1", "d-1", "d-2", "d-3"),
    "workload": "spiffe://acme/agent",
}


def read(found: Permit, **changes: Any) -> Permit:
    claims = found.to_claims()
    return from_claims({**claims, **changes}, token="the token")


def in_detail(**changes: Any) -> JsonObject:
    """The claims of a permit whose one detail is changed so; None takes a member away."""
    claims = permit().to_claims()
    detail: Any = claims["authorization_details"]
    changed = {**detail[0], **changes}
    kept = {name: value for name, value in changed.items() if value is not None}
    return {**claims, "authorization_details": [kept]}


def in_context(**changes: Any) -> JsonObject:
    claims = permit().to_claims()
    context: Any = claims["tctx"]
    return {**claims, "tctx": {**context, **changes}}


def is_refused(claims: JsonObject) -> bool:
    try:
        from_claims(claims, token="")
    except PermitError as error:
        return error.reason_code == "permit_invalid"
    return False


def test_everything_that_a_permit_says_is_read_again() -> None:
    text = token(**EVERYTHING)
    found = verifier().verify(text, tool="orders.update", arguments=ARGUMENTS)
    assert found == permit(**EVERYTHING)
    assert found.token == text
    assert verifier().authenticate(text).token == text


def test_what_a_permit_does_not_say_is_empty() -> None:
    plain = permit(scopes=(), hold_id="", resource="")
    assert read(plain) == plain
    assert (read(plain).scopes, read(plain).hold_id, read(plain).resource) == ((), "", "")


def test_who_acts_now_is_outermost() -> None:
    claims = permit(**EVERYTHING).to_claims()
    assert claims["act"] == {
        "sub": "helper",
        "act": {"sub": "worker", "act": {"sub": "planner"}},
    }
    assert permit(agents=("planner",)).to_claims()["act"] == {"sub": "planner"}


def test_a_permit_that_is_bound_names_its_certificate_as_rfc_8705_says() -> None:
    thumbprint = "A" * 43
    bound = permit(certificate_sha256=thumbprint)
    assert bound.to_claims()["cnf"] == {"x5t#S256": thumbprint}
    assert read(bound) == bound
    wrong: tuple[Any, ...]
    wrong = ({}, {"x5t#S256": ""}, {"x5t#S256": "A" * 42}, {"x5t#s256": thumbprint}, None)
    for each in wrong:
        assert is_refused({**bound.to_claims(), "cnf": each})
    assert "cnf" not in permit().to_claims()


def test_a_scope_is_what_stands_between_single_spaces() -> None:
    assert read(permit(), scope="a b").scopes == ("a", "b")
    assert read(permit(), scope="a  b").scopes == ("a", "", "b")
    assert read(permit(), scope="a\tb").scopes == ("a\tb",)


@pytest.mark.parametrize("uses", (1, 2, MAX_USES))
def test_a_permit_for_several_calls_says_for_how_many(uses: int) -> None:
    several = permit(arguments_sha256="", resource="", max_uses=uses)
    assert read(several).max_uses == uses
    for beyond in (0, -1, MAX_USES + 1):
        assert is_refused(in_detail(args_sha256=None, identifier=None, max_uses=beyond))


@pytest.mark.parametrize("number", (1, MAX_AGENTS))
def test_a_chain_has_one_agent_at_least_and_not_too_many(number: int) -> None:
    agents = tuple(f"agent-{n}" for n in range(number))
    assert read(permit(agents=agents)).agents == agents
    longer = permit(agents=(*(f"agent-{n}" for n in range(MAX_AGENTS)), "one more"))
    assert is_refused(longer.to_claims())
    assert is_refused({**permit().to_claims(), "act": {}})


@pytest.mark.parametrize("number", (1, MAX_DELEGATIONS))
def test_what_it_stands_on_is_one_token_at_least_and_not_too_many(number: int) -> None:
    ids = tuple(f"d-{n}" for n in range(number))
    assert read(permit(delegations=ids)).delegations == ids
    for wrong in ([], ["d"] * (MAX_DELEGATIONS + 1), [""], ["d", ""], ["d", 7], ["d", None], "d"):
        assert is_refused(in_context(delegations=wrong))


def test_a_token_says_which_key_has_signed_it() -> None:
    assert jws.key_id(token()) == KEY.kid
    payload = token().split(".")[1]
    for nameless in (payload, "", "eyJ", f"{payload}.{token()}"):
        with pytest.raises(jws.JwsError):
            jws.key_id(nameless)


def test_a_token_is_read_up_to_its_longest() -> None:
    longest = token(workload="w" * 5_000)
    spare = jws.MAX_LENGTH - len(longest)
    exact = token(workload="w" * (5_000 + spare * 3 // 4))
    assert jws.MAX_LENGTH - 3 <= len(exact) <= jws.MAX_LENGTH
    assert verifier().authenticate(exact).workload
    beyond = token(workload="w" * (5_000 + spare * 3 // 4 + 3))
    with pytest.raises(PermitError):
        verifier().authenticate(beyond)
