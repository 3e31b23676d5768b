"""The tool side against a real sidecar: verified, then redeemed exactly once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdp.client import Guard
from pdp.permit import Permit, PermitError, PermitRedeemer, PermitVerifier

ARGUMENTS: dict[str, Any] = {"order_id": "918", "status": "shipped"}


@pytest.fixture
def redeemer(target: str) -> Iterator[PermitRedeemer]:
    with PermitRedeemer(target, timeout_seconds=30) as redeemer:
        yield redeemer


@pytest.fixture
def permit(guard: Guard, token: str) -> Permit:
    with guard.acting_for(token):
        return guard.authorize("orders.update", ARGUMENTS, audience="orders")


def refused(redeem: Callable[[], object]) -> str:
    with pytest.raises(PermitError) as caught:
        redeem()
    assert "eyJ" not in str(caught.value)
    return caught.value.reason_code


def test_a_tool_verifies_and_redeems_what_it_was_sent(
    redeemer: PermitRedeemer, permit: Permit
) -> None:
    verifier = PermitVerifier(redeemer.keys(), issuer="agent-pdp", audience="orders")
    found = verifier.verify(permit.token, tool="orders.update", arguments=ARGUMENTS)
    assert found == permit
    redeemer.redeem(found)
    assert refused(lambda: redeemer.redeem(found)) == "permit_used"


def test_a_verifier_of_another_audience_refuses_it(
    redeemer: PermitRedeemer, permit: Permit
) -> None:
    verifier = PermitVerifier(redeemer.keys(), issuer="agent-pdp", audience="mail")
    verify = verifier.verify
    assert (
        refused(lambda: verify(permit.token, tool="orders.update", arguments=ARGUMENTS))
        == "permit_mismatch"
    )


def test_every_redemption_is_one_of_its_own(redeemer: PermitRedeemer, permit: Permit) -> None:
    redeemer.redeem(permit)
    assert refused(lambda: redeemer.redeem(permit)) == "permit_used"


@pytest.mark.parametrize(
    ("changes", "reason_code"),
    (
        ({"audience": "mail"}, "permit_mismatch"),
        ({"tool": "orders.delete"}, "permit_mismatch"),
        ({"arguments_sha256": "0" * 64}, "permit_mismatch"),
        ({"token": ""}, "permit_missing"),
        ({"token": "eyJ.eyJ.eyJ"}, "permit_invalid"),
        ({"token": "x" * 10_000}, "request_invalid"),
    ),
)
def test_the_sidecar_checks_again_what_a_tool_claims(
    redeemer: PermitRedeemer, permit: Permit, changes: dict[str, str], reason_code: str
) -> None:
    claimed = replace(permit, **changes)  # type: ignore[arg-type]
    assert refused(lambda: redeemer.redeem(claimed)) == reason_code
    redeemer.redeem(permit)


def test_of_100_at_once_exactly_one_redeems(redeemer: PermitRedeemer, permit: Permit) -> None:
    def attempt(_number: int) -> str:
        try:
            redeemer.redeem(permit)
        except PermitError as error:
            return error.reason_code
        return "redeemed"

    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(attempt, range(100)))
    assert sorted(found) == ["permit_used"] * 99 + ["redeemed"]


def test_what_was_reported_is_redeemed_no_more(
    guard: Guard, redeemer: PermitRedeemer, permit: Permit
) -> None:
    guard.executed(permit)
    assert refused(lambda: redeemer.redeem(permit)) == "permit_used"


def test_without_a_sidecar_nothing_is_redeemed(permit: Permit, tmp_path: Path) -> None:
    with PermitRedeemer(f"unix://{tmp_path}/nobody.sock") as redeemer:
        assert refused(lambda: redeemer.redeem(permit)) == "pdp_unavailable"
        assert refused(redeemer.keys) == "pdp_unavailable"


def test_a_worker_that_is_forked_redeems_too(redeemer: PermitRedeemer, permit: Permit) -> None:
    redeemer.keys()  # the connection is open before the fork
    child = os.fork()
    if child == 0:
        code = 1
        try:
            redeemer.redeem(permit)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert refused(lambda: redeemer.redeem(permit)) == "permit_used"
