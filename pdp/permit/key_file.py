"""The public permit keys of others, in a file that is read again when it changes."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pdp.permit.claims import PermitError
from pdp.permit.followed import FollowedKeys
from pdp.permit.keys import PermitKeySet
from pdp.reason import ReasonCode


class PublicKeyFile(FollowedKeys[PermitKeySet]):
    """A JWK set of another trust domain's sidecars."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises PermitError."""
        super().__init__(path, _read)

    def find(self, kid: str) -> Ed25519PublicKey | None:
        """The key of that id."""
        return self.keys.find(kid)

    def _take(self, keys: PermitKeySet) -> None:
        self.keys = keys


def _read(path: Path) -> PermitKeySet:
    try:
        return PermitKeySet.from_file(path)
    except OSError as error:
        raise PermitError(
            ReasonCode.PERMIT_UNAVAILABLE, f"The keys {path} can not be read: {error.strerror}."
        ) from None
    except PermitError as error:
        raise PermitError(error.reason_code, f"{path}: {error.message}") from None
