"""The keys of one sidecar, while they change: one signs, the others still verify.

They stand in one PEM file, in which order says what each is for. The first private key
signs. Every other key, private or public, only verifies: one that is to sign next is
published before it does, and one that signed before is kept until nobody shows a permit
of it any more. Files that are mounted are changed where they come from, by the same rules.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from pdp.canonical import JsonObject
from pdp.permit import jws
from pdp.permit.claims import PermitError
from pdp.permit.followed import FollowedKeys
from pdp.permit.keys import MAX_KEYS, PermitKeySet, thumbprint
from pdp.permit.signing import SigningKey
from pdp.private_files import replace, write_once
from pdp.reason import ReasonCode

MAX_FILE_BYTES: Final = 64 * 1024

_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z ]{1,32})-----.*?-----END \1-----", re.DOTALL)
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RingKey:
    """One key of a ring."""

    kid: str
    public: Ed25519PublicKey
    private: SigningKey | None
    """None for one that can only verify."""

    def to_pem(self) -> bytes:
        """The key as PEM; a secret where it is private."""
        if self.private is not None:
            return self.private.to_pem()
        return self.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def only_public(self) -> RingKey:
        """What is left of it when it signs no more."""
        return RingKey(self.kid, self.public, None)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of a file, in its order. At least one is private."""

    keys: tuple[RingKey, ...]

    @property
    def signing(self) -> SigningKey:
        """The key that signs."""
        return next(key.private for key in self.keys if key.private is not None)

    @property
    def public_set(self) -> PermitKeySet:
        """Every key, to verify with."""
        return PermitKeySet({key.kid: key.public for key in self.keys})

    @classmethod
    def generate(cls) -> KeyRing:
        """One new key."""
        return cls((_ring_key(SigningKey.generate()),))

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Read a file that nobody but its owner may read; or, as a secret that Kubernetes
        mounts for a user who is not root, one of root's that a group may read too. Raises
        PermitError (permit_unavailable) with what to do.
        """
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise _unusable(path, f"can not be read: {error.strerror}") from None
        mode = stat.S_IMODE(found.st_mode)
        mounted = found.st_uid == 0 and os.geteuid() != 0
        if mode & (0o037 if mounted else 0o077):
            raise _unusable(path, f"is open to others (mode {mode:04o}); run chmod 600 on it")
        if len(content) > MAX_FILE_BYTES:
            raise _unusable(path, f"is larger than {MAX_FILE_BYTES} bytes")
        keys = tuple(_parse(path, match[0], match[1]) for match in _BLOCK.finditer(content))
        if not any(key.private for key in keys):
            raise _unusable(path, "holds no unencrypted PKCS 8 PEM key")
        if len({key.kid for key in keys}) != len(keys):
            raise _unusable(path, "holds a key twice")
        if len(keys) > MAX_KEYS:
            raise _unusable(path, f"holds more than {MAX_KEYS} keys")
        return cls(keys)

    def to_pem(self) -> bytes:
        """The file's content. A secret."""
        return b"".join(key.to_pem() for key in self.keys)

    def write(self, path: Path) -> None:
        """Put it in the file's place, whole or not at all, mode 0600. Raises OSError."""
        replace(path, self.to_pem)

    def with_next(self) -> KeyRing:
        """With a new key, which is published and does not sign yet."""
        return KeyRing((*self.keys, _ring_key(SigningKey.generate())))

    def signing_with(self, kid: str) -> KeyRing:
        """With the key of that id to sign; the one that signed before only verifies from
        now on, and can never sign again. Raises PermitError.
        """
        chosen = self._find(kid)
        if chosen.private is None:
            raise _refused(f"The key {kid} is not private here: it can only verify.")
        before = self.signing.kid
        others = (
            key.only_public() if key.kid == before else key for key in self.keys if key.kid != kid
        )
        return KeyRing((chosen, *others))

    def without(self, kid: str) -> KeyRing:
        """Without the key of that id: permits that it signed count no more. Raises
        PermitError.
        """
        if self._find(kid).kid == self.signing.kid:
            raise _refused(f"The key {kid} is the one that signs: let another one sign first.")
        return KeyRing(tuple(key for key in self.keys if key.kid != kid))

    def _find(self, kid: str) -> RingKey:
        for key in self.keys:
            if key.kid == kid:
                return key
        raise _refused(f"There is no key {kid}: pdp keys list shows those that are there.")


class LiveKeys(FollowedKeys[KeyRing]):
    """The keys that are in force, as signer and as verifiers see them."""

    def __init__(self, path: Path, *, make: bool = False) -> None:
        """Read the file or, where it is missing and is to be made, make it with a new key.
        Raises PermitError.
        """
        if make:
            write_once(path, lambda: KeyRing.generate().to_pem())
        super().__init__(path, KeyRing.from_file)

    def sign(self, payload: JsonObject, *, kind: str = jws.TYPE) -> str:
        """A token of that type with this payload, by the key that signs now."""
        return self.ring.signing.sign(payload, kind=kind)

    def find(self, kid: str) -> Ed25519PublicKey | None:
        """The public key of that id."""
        return self._public.find(kid)

    def to_jwks(self) -> str:
        """All public keys as a JWK set in JSON."""
        return self._jwks

    def _take(self, ring: KeyRing) -> None:
        self.ring = ring
        self._public = ring.public_set
        self._jwks = self._public.to_jwks()

    def _changed(self) -> None:
        _log.warning("permits are signed with key %s", self.ring.signing.kid)


def _parse(path: Path, block: bytes, label: bytes) -> RingKey:
    try:
        if label == b"PUBLIC KEY":
            public = load_pem_public_key(block)
            if isinstance(public, Ed25519PublicKey):
                return RingKey(thumbprint(public), public, None)
        elif label == b"PRIVATE KEY":
            private = load_pem_private_key(block, password=None)
            if isinstance(private, Ed25519PrivateKey):
                return _ring_key(SigningKey(private))
    except Exception:  # noqa: BLE001 - cryptography's have no common root, and some are OpenSSL's own
        raise _unusable(path, "holds a PEM block that can not be read") from None
    raise _unusable(path, "holds something that is not an unencrypted Ed25519 key")


def _ring_key(key: SigningKey) -> RingKey:
    return RingKey(key.kid, key.public, key)


def _unusable(path: Path, what: str) -> PermitError:
    return _refused(f"The permit key {path} {what}.")


def _refused(message: str) -> PermitError:
    return PermitError(ReasonCode.PERMIT_UNAVAILABLE, message)
