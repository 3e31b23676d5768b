"""An issuer's keys from a file, which may be replaced at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from pdp.identity.key_source import fault_of
from pdp.identity.keys import MAX_JWKS_BYTES, IssuerKey, JwksError, parse_jwks


class JwksFile:
    """A JWK set that an operator has written or mounted. It is read anew each time, so that
    it does not matter how it was replaced: in place, by renaming, behind a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[bytes, Mapping[str, IssuerKey]] | None = None

    @property
    def place(self) -> str:
        """The path."""
        return str(self._path)

    def read(self) -> Mapping[str, IssuerKey]:
        """What the file holds now. Raises KeySourceError."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_JWKS_BYTES + 1)
            if self._read is None or self._read[0] != data:
                self._read = data, parse_jwks(data, strict=True)
        except OSError as error:
            raise fault_of(self.place, f"can not be read: {error.strerror}") from None
        except JwksError as error:
            raise fault_of(self.place, str(error)) from None
        return self._read[1]

    def read_first(self) -> Mapping[str, IssuerKey]:
        """The same, at the start: a file without a key is then a mistake. Later it takes all
        keys away. Raises KeySourceError.
        """
        keys = self.read()
        if not keys:
            raise fault_of(self.place, "holds no signing key of type Ed25519, P-256 or RSA")
        return keys

    async def fetch(self) -> Mapping[str, IssuerKey]:
        """What read says, off the loop."""
        return await asyncio.to_thread(self.read)

    async def close(self) -> None:
        """Nothing is open."""
