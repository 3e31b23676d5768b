"""The file of the keys that sign permits (pdp.permit.ring)."""

from __future__ import annotations

import atexit
import base64
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pdp.permit import PermitError
from pdp.permit.ring import KeyRing
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited_bytes
from tests.fuzz.contract import refuses

SPACE: Final = Path(tempfile.mkdtemp(prefix="fuzz-keys-"))
atexit.register(shutil.rmtree, SPACE, ignore_errors=True)
PRIVATE: Final = jose.KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PUBLIC: Final = jose.STRANGER.public_key().public_bytes(
    Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
)
BODY: Final = PRIVATE.splitlines()[1].decode()


def samples() -> Iterable[bytes]:
    yield b"\0" + PRIVATE
    yield b"\1"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    if choices.number(2) == 0:
        content = choices.rest()
    else:
        content = edited_bytes(PRIVATE + PUBLIC, choices)
        if choices.yes():
            content = _with_der(choices)
    path = SPACE / "permit-keys.pem"
    path.touch(mode=0o600)
    path.write_bytes(content)
    ring = refuses(lambda: KeyRing.from_file(path), PermitError, secret=BODY)
    if ring is None:
        return False
    assert BODY not in repr(ring)
    path.write_bytes(ring.to_pem())
    again = KeyRing.from_file(path)
    assert [key.kid for key in again.keys] == [key.kid for key in ring.keys]
    assert again.signing.kid == ring.signing.kid
    assert ring.public_set.find(ring.signing.kid) is not None
    assert "PRIVATE" not in ring.public_set.to_jwks()
    return True


def _with_der(choices: Choices) -> bytes:
    """A key whose bytes are changed, in PEM that is in order."""
    label = choices.pick(["PRIVATE KEY", "PUBLIC KEY", "EC PRIVATE KEY"])
    der = edited_bytes(base64.b64decode(BODY), choices)
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()
