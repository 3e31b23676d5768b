"""Every vector of Wycheproof for signatures and keys, through what verifies our tokens.

What is signed with another algorithm than ours is refused, valid or not.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdp.identity.key_source import FixedKeys
from pdp.identity.keys import IssuerKey, JwksError, parse_jwks
from pdp.identity.resolver import IdentityError
from pdp.identity.signature import SignedToken, verified_signature

VECTORS = Path(__file__).parent / "vectors"
ACCEPTED = frozenset({"EdDSA", "ES256", "RS256"})


@dataclass(frozen=True)
class Vector:
    file: str
    number: int
    comment: str
    jwks: str
    token: str
    valid: bool

    @property
    def algorithm(self) -> str:
        """As the token says, as far as it can be read."""
        try:
            return str(SignedToken.read(self.token).header.get("alg"))
        except IdentityError:
            return "unreadable"


def vectors(name: str) -> Iterator[Vector]:
    document = json.loads((VECTORS / name).read_text())
    for group in document["testGroups"]:
        # Of a symmetric key there is but the private half, which verifies too.
        keys: Any = group.get("public") or group["private"]
        jwks = json.dumps(keys if "keys" in keys else {"keys": [keys]})
        for test in group["tests"]:
            yield Vector(
                file=name,
                number=test["tcId"],
                comment=test["comment"],
                jwks=jwks,
                token=test["jws"],
                valid=test["result"] == "valid",
            )


def is_accepted(vector: Vector) -> bool:
    try:
        keys: dict[str, IssuerKey] = parse_jwks(vector.jwks.encode(), strict=False)
    except JwksError:
        keys = {}
    try:
        token = SignedToken.read(vector.token)
        asyncio.run(verified_signature(token, FixedKeys(keys), ACCEPTED))
    except IdentityError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "outcomes"),
    (
        (
            "json_web_signature_test.json",
            {"ours, valid": 10, "ours, invalid": 252, "others, valid": 36, "others, invalid": 103},
        ),
        (
            "json_web_key_test.json",
            {"ours, valid": 1, "ours, invalid": 10, "others, valid": 4, "others, invalid": 11},
        ),
    ),
)
def test_every_vector_has_the_right_answer(name: str, outcomes: dict[str, int]) -> None:
    seen: Counter[str] = Counter()
    wrong = []
    for vector in vectors(name):
        ours = vector.algorithm in ACCEPTED
        seen[f"{'ours' if ours else 'others'}, {'valid' if vector.valid else 'invalid'}"] += 1
        if is_accepted(vector) is not (vector.valid and ours):
            wrong.append((vector.number, vector.comment))
    assert wrong == []
    assert seen == outcomes
    assert seen.total() == json.loads((VECTORS / name).read_text())["numberOfTests"]


@pytest.mark.parametrize(
    ("comment", "problem"),
    (
        ("rejectsKeyWithRocaVulnerability", "can be factored"),
        ("rejects1024bitRsaKey", "fewer than 2048 bits"),
        ("rejectsPublicExponent1", "can not be read"),
        ("rejectsModifiedKey", "can not be read"),
    ),
)
def test_a_weak_key_is_refused_before_anything_is_signed_with_it(
    comment: str, problem: str
) -> None:
    of_that_kind = [one for one in vectors("json_web_key_test.json") if one.comment == comment]
    problems = []
    for vector in of_that_kind:
        assert parse_jwks(vector.jwks.encode(), strict=False) == {}
        try:
            problems.append(str(parse_jwks(vector.jwks.encode(), strict=True)))
        except JwksError as error:
            problems.append(str(error))
    assert any(problem in one for one in problems), problems
