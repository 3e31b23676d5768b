from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdp.client import Guard
from pdp.testing import SidecarProcess, TokenIssuer
from tests.client.faces import Awaiting, Blocking, Face
from tests.client.stand_in import StandIn

BUNDLE = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"


@pytest.fixture(scope="session")
def issuer() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture(scope="session")
def sidecar(
    issuer: TokenIssuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("sidecar")
    with SidecarProcess(directory, issuer=issuer, bundle=BUNDLE) as sidecar:
        yield sidecar


@pytest.fixture
def target(sidecar: SidecarProcess) -> str:
    return sidecar.target


@pytest.fixture
def actor() -> str:
    """Somebody new, so that tests share no limit and no record."""
    return f"user-{uuid.uuid4()}"


@pytest.fixture
def token_of(issuer: TokenIssuer) -> Callable[..., str]:
    """The token of an actor of a tenant, who may use the orders' tools and mail."""

    def token(tenant: str, actor: str, roles: Sequence[str] = ("support_agent",)) -> str:
        scopes = ["orders:read", "orders:write", "mail:send"]
        return issuer.token(tenant, actor, roles=roles, scopes=scopes)

    return token


@pytest.fixture
def token(token_of: Callable[[str, str], str], actor: str) -> str:
    return token_of("tenant_acme", actor)


@pytest.fixture
def guard(target: str) -> Iterator[Guard]:
    with Guard(target) as guard:
        yield guard


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as stand_in:
        yield stand_in


@pytest.fixture
def audit(sidecar: SidecarProcess, actor: str) -> Callable[[], list[dict[str, Any]]]:
    """Reads what the audit log says of this test's actor."""

    def records() -> list[dict[str, Any]]:
        files = sorted((sidecar.directory / "state" / "audit").glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
        return [record for record in map(json.loads, lines) if record["actor_id"] == actor]

    return records


@pytest.fixture(params=(Blocking, Awaiting), ids=("guard", "async_guard"))
def face_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., Face]]:
    """Makes a guard, of each of the two faces in turn."""
    faces: list[Face] = []

    def face(target: str, **options: Any) -> Face:
        faces.append(request.param(target, **options))
        return faces[-1]

    yield face
    for made in faces:
        made.dispose()


@pytest.fixture
def face(face_of: Callable[..., Face], target: str) -> Face:
    """A guard at the real sidecar."""
    return face_of(target)
