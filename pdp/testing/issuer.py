"""A token issuer with a key of its own."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from joserfc import jws
from joserfc.jwk import OKPKey

from pdp.canonical import JsonObject


class TokenIssuer:
    """Mints tokens as an identity provider would, and publishes its JWK set."""

    def __init__(
        self,
        issuer: str = "https://id.example",
        *,
        audience: str = "agent-service",
        kid: str = "issuer-key-1",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.issuer = issuer
        self.audience = audience
        self.kid = kid
        self._key = OKPKey.generate_key("Ed25519")
        self._clock = clock

    def write_jwks(self, path: Path) -> Path:
        """Write the public key set to a file, and return its path."""
        public = {**self._key.as_dict(private=False), "kid": self.kid, "use": "sig", "alg": "EdDSA"}
        path.write_text(json.dumps({"keys": [public]}), encoding="utf-8")
        return path

    def token(
        self,
        tenant: str | None,
        actor: str,
        *,
        roles: Sequence[str] = (),
        scopes: Sequence[str] = (),
        lifetime_seconds: int = 3_600,
        **claims: Any,  # noqa: ANN401 - any claim, wrong ones too
    ) -> str:
        """A signed token. ``claims`` are added, or take the place of usual ones; one
        that is None is left out.
        """
        now = int(self._clock())
        usual = {
            "iss": self.issuer,
            "aud": self.audience,
            "sub": actor,
            "iat": now,
            "exp": now + lifetime_seconds,
            "tenant_id": tenant,
            "roles": list(roles),
            "scope": " ".join(scopes),
        }
        payload = {name: value for name, value in {**usual, **claims}.items() if value is not None}
        return self.sign(json.dumps(payload).encode("utf-8"))

    def sign(self, payload: bytes, *, header: JsonObject | None = None) -> str:
        """Sign these bytes, whatever they are, under this header; a member that is None is
        left out.
        """
        usual = {"alg": "EdDSA", "kid": self.kid, "typ": "JWT"}
        named = {**usual, **(header or {})}
        members = {name: value for name, value in named.items() if value is not None}
        with warnings.catch_warnings():
            # joserfc warns that the name EdDSA is being replaced by Ed25519.
            warnings.simplefilter("ignore")
            return jws.serialize_compact(members, payload, self._key, algorithms=["EdDSA"])
