"""A tool server of several sidecars, whose keys change while it runs."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pdp.canonical import JsonObject
from pdp.client import Guard
from pdp.permit import (
    Permit,
    PermitError,
    PermitKeySet,
    PermitRedeemer,
    PermitVerifier,
    Sidecars,
)
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey
from pdp.reason import ReasonCode
from pdp.testing import SidecarProcess, TokenIssuer
from pdp.tool import PermitDoor
from tests.e2e.operating import command, soon
from tests.tool.permits import ORDER, permit

BUNDLE = Path(__file__).resolve().parents[2] / "policies" / "bundle.tar.gz"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Sidecar(PermitRedeemer):
    """Stands for one sidecar: publishes keys, and redeems permits of its ledger once."""

    def __init__(self, ledger: str, *keys: SigningKey) -> None:
        super().__init__("unix:///nowhere")
        self.ledger = ledger
        self.signers = list(keys)
        self.reachable = True
        self.asked = 0
        self.redeemed: list[str] = []
        self.refused = 0

    def keys(self) -> PermitKeySet:
        self.asked += 1
        if not self.reachable:
            raise PermitError(ReasonCode.PDP_UNAVAILABLE, "It is gone.")
        return PermitKeySet({key.kid: key.public for key in self.signers})

    def redeem(self, permit: Permit) -> None:
        if not self.reachable:
            raise PermitError(ReasonCode.PDP_UNAVAILABLE, "It is gone.")
        if permit.ledger != self.ledger:
            self.refused += 1
            raise PermitError(ReasonCode.PERMIT_MISMATCH, "Another sidecar issued the permit.")
        if permit.id in self.redeemed:
            raise PermitError(ReasonCode.PERMIT_USED, "It is used.")
        self.redeemed.append(permit.id)

    def issue(self) -> Permit:
        return PermitIssuer(self.signers[0], issuer="agent-pdp").sign(
            replace(permit(), ledger=self.ledger)
        )


class Domain:
    """Two sidecars with keys of their own, and a tool server."""

    def __init__(self) -> None:
        self.one = Sidecar("ledger-one", SigningKey.generate())
        self.two = Sidecar("ledger-two", SigningKey.generate())
        self.clock = Clock()
        self.sidecars = Sidecars([self.one, self.two], clock=self.clock)
        verifier = PermitVerifier(self.sidecars, issuer="agent-pdp", audience="orders")
        self.door = PermitDoor(verifier, self.sidecars)

    def admit(self, shown: Permit) -> str:
        try:
            self.door.admit(shown.token, tool="orders.update", arguments=ORDER)
        except PermitError as error:
            return error.reason_code
        return "ok"


@pytest.fixture
def domain() -> Domain:
    return Domain()


def test_permits_of_each_are_redeemed_where_they_were_issued_and_once(domain: Domain) -> None:
    for sidecar in (domain.one, domain.two):
        shown = sidecar.issue()
        assert domain.admit(shown) == "ok"
        assert sidecar.redeemed == [shown.id]
        assert domain.admit(shown) == "permit_used"
    assert (domain.one.refused, domain.two.refused) == (0, 0)


def test_a_stranger_s_permit_is_refused_and_asks_for_keys_once_in_a_while(domain: Domain) -> None:
    stranger = Sidecar("ledger-one", SigningKey.generate())
    for _ in range(50):
        assert domain.admit(stranger.issue()) == "permit_invalid"
    assert domain.one.asked == 1
    domain.clock.now += 10
    assert domain.admit(stranger.issue()) == "permit_invalid"
    assert domain.one.asked == 2


def test_a_new_key_is_accepted_without_a_restart(domain: Domain) -> None:
    assert domain.admit(domain.one.issue()) == "ok"
    domain.one.signers.insert(0, SigningKey.generate())
    shown = domain.one.issue()
    assert domain.admit(shown) == "permit_invalid"  # within the cooldown
    domain.clock.now += 10
    assert domain.admit(shown) == "ok"


def test_a_key_that_is_published_no_more_counts_no_more(domain: Domain) -> None:
    shown = domain.one.issue()
    assert domain.admit(domain.one.issue()) == "ok"
    domain.one.signers = [SigningKey.generate()]
    domain.clock.now += 59
    assert domain.admit(domain.two.issue()) == "ok"
    domain.clock.now += 1
    assert domain.admit(shown) == "permit_invalid"


def test_a_permit_is_not_called_false_before_its_sidecar_could_be_asked(domain: Domain) -> None:
    shown = domain.two.issue()
    domain.two.reachable = False
    assert domain.admit(shown) == "pdp_unavailable"
    assert domain.admit(shown) == "pdp_unavailable", "within the cooldown"
    assert domain.admit(domain.one.issue()) == "ok", "what can be known is"
    domain.two.reachable = True
    domain.clock.now += 10
    assert domain.admit(shown) == "ok"
    assert domain.admit(Sidecar("ledger-two", SigningKey.generate()).issue()) == "permit_invalid"


def test_a_sidecar_that_is_gone_keeps_its_keys_for_a_bounded_time(domain: Domain) -> None:
    assert domain.admit(domain.one.issue()) == "ok"
    domain.two.reachable = False
    verifier = PermitVerifier(domain.sidecars, issuer="agent-pdp", audience="orders")
    offline = PermitDoor(verifier, None)

    def verifies() -> str:
        try:
            offline.admit(domain.two.issue().token, tool="orders.update", arguments=ORDER)
        except PermitError as error:
            return error.reason_code
        return "ok"

    domain.clock.now += 3_600
    assert verifies() == "ok"
    domain.clock.now += 1
    assert verifies() == "pdp_unavailable"
    assert domain.admit(domain.one.issue()) == "ok"


def test_one_of_many_that_share_a_store_may_be_gone(domain: Domain) -> None:
    """They share the key, too, as replicas do."""
    domain.two.ledger, domain.two.signers = domain.one.ledger, domain.one.signers
    domain.two.redeemed = domain.one.redeemed
    first, second = domain.one.issue(), domain.one.issue()
    assert domain.admit(first) == "ok"
    domain.one.reachable = False
    assert domain.admit(first) == "permit_used"
    assert domain.admit(second) == "ok"
    domain.two.reachable = False
    assert domain.admit(domain.one.issue()) == "pdp_unavailable"


def test_sidecars_that_share_a_key_and_no_store_are_told_apart_by_their_ledger(
    domain: Domain,
) -> None:
    domain.two.signers = domain.one.signers
    for _ in range(3):
        assert domain.admit(domain.two.issue()) == "ok"
    assert domain.one.refused == 1  # learned at the first


def test_known_keys_do_not_wait_for_a_sidecar_that_hangs(domain: Domain) -> None:
    assert domain.admit(domain.one.issue()) == "ok"
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> PermitKeySet:
        hangs.set()
        assert goes_on.wait(20)
        raise PermitError(ReasonCode.DEADLINE_EXCEEDED, "It hangs.")

    domain.two.keys = hang  # type: ignore[method-assign]
    domain.clock.now += 60
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(domain.admit, domain.one.issue())
        assert hangs.wait(20)
        assert domain.admit(domain.one.issue()) == "ok"
        goes_on.set()
        assert waiting.result(20) == "ok"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_was_forked_while_keys_were_asked_for_asks_by_itself(domain: Domain) -> None:
    with domain.sidecars._asking():
        child = os.fork()
        if child == 0:
            # Whatever happens in the child, none of it goes on with the tests.
            status = 1
            try:
                status = 0 if domain.admit(domain.one.issue()) == "ok" else 1
            finally:
                os._exit(status)
    deadline = time.monotonic() + 20
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if not found:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (found, status) == (child, 0)


def test_no_sidecar_is_no_trust_domain() -> None:
    with pytest.raises(ValueError, match="1 to 256"):
        Sidecars([])


# Real ones


@pytest.fixture
def idp() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture
def two(tmp_path: Path, idp: TokenIssuer) -> Iterator[tuple[SidecarProcess, SidecarProcess]]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        SidecarProcess(tmp_path / "one", issuer=idp, bundle=BUNDLE) as one,
        SidecarProcess(tmp_path / "two", issuer=idp, bundle=BUNDLE) as other,
    ):
        yield one, other


def test_a_tool_server_of_two_real_sidecars_outlives_their_key_rotations(
    two: tuple[SidecarProcess, SidecarProcess], idp: TokenIssuer
) -> None:
    token = idp.token("tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:write"])
    arguments: JsonObject = {"order_id": "918", "status": "shipped"}
    with Sidecars(
        [PermitRedeemer(sidecar.target) for sidecar in two], cooldown_seconds=0
    ) as sidecars:
        verifier = PermitVerifier(sidecars, issuer="agent-pdp", audience="orders")
        door = PermitDoor(verifier, sidecars)

        def call(sidecar: SidecarProcess) -> Permit:
            with Guard(sidecar.target, audience="orders") as guard, guard.acting_for(token):
                shown = guard.authorize("orders.update", arguments)
            return door.admit(shown.token, tool="orders.update", arguments=arguments)

        before = [call(sidecar) for sidecar in two]
        assert len({shown.ledger for shown in before}) == 2
        for sidecar in two:
            command(sidecar, "keys", "rotate", "--overlap-seconds", "0")

        def signs_anew(sidecar: SidecarProcess, old: Permit) -> bool:
            return call(sidecar).token.split(".")[0] != old.token.split(".")[0]

        for sidecar, old in zip(two, before, strict=True):
            assert soon(functools.partial(signs_anew, sidecar, old))
