"""What is revoked, as a file or a shared store holds it (pdp.revocation)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from pdp.canonical import JsonValue
from pdp.revocation.revocations import Kind, from_json, to_json
from tests.fuzz.choices import Choices, edited
from tests.fuzz.contract import SECRET, refuses

LIST: Final[JsonValue] = {
    "revocations": [
        {"kind": kind, "tenant": tenant, "name": name, "by": "sre", "reason": SECRET, "at": 1, "until": 2}
        for kind, tenant, name in (
            ("tenant", "tenant_acme", ""),
            ("actor", "tenant_acme", "user-7"),
            ("workload", "", "spiffe://example.org/agent"),
            ("token", "tenant_acme", "token-1"),
        )
    ]
}  # fmt: skip


def samples() -> Iterable[bytes]:
    yield b"\0" + json.dumps(LIST).encode()
    yield b"\1"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    if choices.yes():
        content = json.dumps(edited(LIST, choices)).encode("utf-8", "surrogatepass")
    else:
        content = choices.rest()
    known = refuses(lambda: from_json(content), ValueError)
    if known is None:
        return False
    # Nothing that is said to be revoked is passed over.
    said = json.loads(content)["revocations"]
    named = {(Kind(each["kind"]), each["tenant"], each["name"]) for each in said}
    assert named == {(target.kind, target.tenant, target.name) for target in known}
    assert from_json(to_json(known.values())) == known
    return True
