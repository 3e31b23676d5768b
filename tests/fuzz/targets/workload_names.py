"""Who a runtime says that it is: by its certificate, or by a token (pdp.identity.workloads)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from pdp.canonical import JsonObject
from pdp.certificates import thumbprint
from pdp.identity.key_source import FixedKeys
from pdp.identity.keys import parse_jwks
from pdp.identity.resolver import Credentials, IdentityError, Peer
from pdp.identity.subject import TENANT_PATTERN
from pdp.identity.tenancy import WorkloadRoute
from pdp.identity.tokens import Issuer
from pdp.identity.workloads import (
    MAX_WORKLOAD_LENGTH,
    WorkloadIssuer,
    Workloads,
    WorkloadTokens,
)
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import at_once, refuses

NOW: Final = 1_800_000_000
DOMAIN: Final = "example.org"
SPIFFE_ID: Final = f"spiffe://{DOMAIN}/tenant/acme/agent"
NAMES: Final = (
    SPIFFE_ID, "spiffe://example.org", "spiffe://other.org/a", "SPIFFE://example.org/a",
    "spiffe://example.org/../a", "spiffe://user@example.org/a", "spiffe://example.org:1/a",
    "https://example.org/a", "agent.example.org", "*.example.org", "spiffe://example.org/a?b",
)  # fmt: skip
ROUTES: Final = (
    "spiffe://example.org/tenant/{tenant}/**",
    "spiffe://example.org/*/{tenant}/agent",
    "system:serviceaccount:{tenant}:*",
)


def _issuer(name: str) -> Issuer:
    return Issuer(
        issuer=name,
        audiences=frozenset({"agent-pdp"}),
        types=frozenset({"jwt", ""}),
        algorithms=frozenset({"EdDSA"}),
        keys=FixedKeys(parse_jwks(jose.JWKS, strict=True)),
    )


WORKLOADS: Final = Workloads(
    required=True,
    certificates=True,
    trust_domains=frozenset({DOMAIN}),
    tokens=WorkloadTokens(
        [
            WorkloadIssuer(issuer=_issuer(f"spiffe://{DOMAIN}"), trust_domain=DOMAIN),
            WorkloadIssuer(issuer=_issuer("https://kubernetes.default.svc"), cluster="c-1"),
        ],
        clock=lambda: NOW,
        cache_entries=100,
    ),
)
HEADER: Final[JsonObject] = {"alg": "EdDSA", "kid": jose.KID, "typ": "JWT"}
SVID: Final[JsonObject] = {"sub": SPIFFE_ID, "aud": ["agent-pdp"], "exp": NOW + 60}
ACCOUNT: Final[JsonObject] = {
    "iss": "https://kubernetes.default.svc",
    "sub": "system:serviceaccount:acme:agent",
    "aud": ["agent-pdp"],
    "exp": NOW + 60,
    "kubernetes.io": {
        "namespace": "acme",
        "serviceaccount": {"name": "agent", "uid": "u"},
        "pod": {"name": "agent-1", "uid": "u"},
    },
}


def samples() -> Iterable[bytes]:
    yield b"\0\0"
    yield b"\1\0"
    yield b"\1\1"
    yield b"\2\0\0\0" + b"spiffe://example.org/tenant/acme/agent"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    match choices.number(4):
        case 0:
            return _certificate(choices)
        case 1:
            return _token(choices)
        case 2:
            return _route(choices)
        case _:
            content = choices.rest()
            return bool(refuses(lambda: thumbprint(content), ValueError))


def _certificate(choices: Choices) -> bool:
    names = [_name(choices) for _ in range(1 + choices.number(3))]
    uris = tuple(names) if choices.number(2) == 0 else ()
    peer = Peer(certificate_sha256="A" * 43, uris=uris, dns_names=() if uris else tuple(names))
    return _checked(Credentials(bearer=None, peer=peer), names)


def _token(choices: Choices) -> bool:
    claims = edited(choices.pick([SVID, ACCOUNT]), choices)
    token = jose.compact(HEADER, json.dumps(claims).encode("utf-8", "surrogatepass"))
    said = claims.get("sub") if isinstance(claims, dict) else None
    return _checked(Credentials(bearer=None, workload_token=token), [said, f"c-1/{said}"])


def _checked(credentials: Credentials, names: Sequence[object]) -> bool:
    workload = refuses(lambda: at_once(WORKLOADS.workload_of(credentials)), IdentityError)
    if workload is None:
        return False
    assert workload in names
    assert 0 < len(workload) <= MAX_WORKLOAD_LENGTH + len("c-1/")
    assert workload.isprintable()
    if not workload.startswith("c-1/"):
        found = urlsplit(workload)
        assert (found.scheme, found.netloc, found.query, found.fragment) == (
            "spiffe",
            DOMAIN,
            "",
            "",
        )
        assert not {"", ".", ".."} & set(found.path.split("/")[1:])
    return True


def _route(choices: Choices) -> bool:
    route = choices.pick(ROUTES)
    pattern = (
        edited_bytes(route.encode(), choices).decode("utf-8", "replace") if choices.yes() else route
    )
    name = _name(choices) if choices.yes() else choices.rest().decode("utf-8", "replace")
    found = refuses(lambda: WorkloadRoute.of(pattern, ""), ValueError)
    if found is None:
        return False
    tenant = refuses(lambda: found.tenant_of(name), IdentityError)
    if tenant is None:
        return False
    assert TENANT_PATTERN.fullmatch(tenant)
    # The tenant is one whole part of the name, where the route has it.
    parts = name.replace(":", "/").split("/")
    assert parts[pattern.replace(":", "/").split("/").index("{tenant}")] == tenant
    return True


def _name(choices: Choices) -> str:
    name = choices.pick(NAMES)
    return (
        edited_bytes(name.encode(), choices).decode("utf-8", "replace") if choices.yes() else name
    )
