"""Permits changed at random, judged by our verifier and by the one for Node."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from scripts.generate_permit_vectors import CERTIFICATE, NOW, PRIVATE, claims, compact, header
from tests.interop.test_permit_vectors import CASES, VECTORS, answer, run_node

SEEDS = (1, 2, 3)
PERMITS = 400
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 999, 1000, 1001, 1.5, NOW, NOW + 60, 2**53 - 1),
    *("", " ", "x", "orders", "tenant_acme", "é", "a" * 64, "A" * 64, CERTIFICATE, "A" * 42),
    *([], ["x"], ["orders"], ["orders.update"], ["", "x"], {}, {"sub": "x"}, {"sub": ""}),
    *({"x5t#S256": CERTIFICATE}, {"sub": "x", "act": {"sub": "y"}}, {"sub": "x", "act": None}),
)
NAMES = (
    *("act", "cnf", "req_wl", "scope", "exp", "nbf", "jti", "args_sha256", "identifier"),
    *("max_uses", "hold_id", "delegations", "tenant", "ledger", "type", "new", "sub"),
)


def places(value: Any) -> list[Any]:
    """Every object and list inside."""
    found = [value] if isinstance(value, dict | list) and value else []
    children = value.values() if isinstance(value, dict) else value if found else ()
    return found + [place for child in children for place in places(child)]


def changed(payload: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    for _ in range(chance.randint(0, 3)):
        place = chance.choice(places(payload))
        key: Any = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        what = chance.random()
        if what < 0.4:
            place[key] = copy.deepcopy(chance.choice(VALUES))
        elif what < 0.6:
            del place[key]
        elif isinstance(place, dict):
            place[chance.choice(NAMES)] = copy.deepcopy(chance.choice(VALUES))
        if not payload:
            break
    return payload


def asked(chance: random.Random) -> dict[str, Any]:
    question: dict[str, Any] = copy.deepcopy(chance.choice([case["question"] for case in CASES]))
    question["time"] = NOW + chance.choice((-6, -5, 0, 1, 64, 65, 66))
    if chance.random() < 0.2:
        question["certificate_sha256"] = CERTIFICATE
    return question


@pytest.mark.parametrize("seed", SEEDS)
def test_two_verifiers_agree_on_permits_that_are_changed_at_random(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - the same each time
    cases: list[dict[str, Any]] = []
    for _ in range(PERMITS):
        head = changed(dict(header()), chance) if chance.random() < 0.1 else header()
        body = changed(claims(), chance)
        signer = chance.choice(("first", "first", "first", *PRIVATE))
        cases.append({"permit": compact(head, body, signer), "question": asked(chance)})
    theirs = run_node("verify", {**VECTORS, "cases": cases})["cases"]
    ours = [answer(case["permit"], case["question"]) for case in cases]
    assert ours == [told["verifier"] for told in theirs]
    assert {"ok", "permit_invalid", "permit_mismatch", "permit_expired"} <= set(ours)
