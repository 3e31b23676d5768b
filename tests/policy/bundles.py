"""What the tests of bundles share: small sound bundles, and archives of any kind."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from pdp.policy.engine import REQUIRED_ENTRYPOINTS, BundleError

ROOT = Path(__file__).resolve().parent.parent.parent
OPA = ROOT / ".tools" / "opa"
WASM = b"\x00asm stands for a module; it is not run here"
REGO = {
    "pdp/authz/authz.rego": b'package pdp.authz\n\ndecision := {"allow": false}\n',
    "pdp/budget/budget.rego": b"package pdp.budget\n\nlimits := []\n\ndecision := true\n",
}
ROOTS = b'{"revision": "r-1", "roots": ["pdp", "tenants"]}'
FILES = {
    **REGO,
    "pdp/authz/authz_test.rego": b"package pdp.authz_test\n\ntest_it if true\n",
    "tenants/data.json": b'{"acme": {"status": "active", "limit": 1.50}}',
    ".manifest": ROOTS,
}
"""Sources as an author keeps them."""


def tar(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for named, body in members:
            member = tarfile.TarInfo(named) if isinstance(named, str) else named
            if member.isreg():
                member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def manifest(**members: object) -> bytes:
    return json.dumps(members).encode()


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return directory


def message_of(refusal: pytest.ExceptionInfo[BundleError]) -> str:
    assert refusal.value.reason_code == "policy_unavailable"
    return refusal.value.message


ENTRYPOINTS = [entrypoint.value for entrypoint in REQUIRED_ENTRYPOINTS]
