"""What a sidecar starts with when its engine does not take what the source holds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pdp.config import BundleSettings, Policy
from pdp.policy.archive import pack, read_archive
from pdp.policy.engine import BundleError
from pdp.server.policy import POLICY_DIRECTORY, FollowedPolicy, load_policy

STARTER = read_archive(Path("policies/bundle.tar.gz").read_bytes(), place="starter")


class Events:
    def __init__(self) -> None:
        self.refused_bundles: list[str] = []

    async def activated(self, revision: str) -> None: ...

    async def refused(self, bundle: str, error: BundleError) -> None:
        self.refused_bundles.append(bundle)

    def unreachable(self, bundle: str) -> None: ...


def release(path: Path, revision: str, **tenants: Any) -> None:
    manifest = json.loads(STARTER[".manifest"]) | {"revision": revision}
    data = json.loads(STARTER["data.json"]) | {"tenants": tenants}
    files = {
        **STARTER,
        ".manifest": json.dumps(manifest).encode(),
        "data.json": json.dumps(data).encode(),
    }
    path.write_bytes(pack(files))


def start(policy: Policy, state: Path) -> tuple[str, list[str], Any]:
    """Revision, bundles that were refused, and status after a start."""
    loaded = load_policy(policy, state).active
    assert loaded is not None

    async def run() -> tuple[str, list[str], Any]:
        followed = await FollowedPolicy.open(policy, policy, loaded)
        events = Events()
        updates = await followed.begin(state / POLICY_DIRECTORY, events)
        await updates.close()
        await followed.live.close()
        return followed.live.revision, events.refused_bundles, followed.status()

    return asyncio.run(run())


# Prepared without a fault; it is the engine that finds that its answers have no form.
FORMLESS = {"pdp-probe": {"status": "active", "limits": ["unlimited"]}}


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    release(tmp_path / "bundle.tar.gz", "r1")
    return Policy(bundles={"main": BundleSettings(path=tmp_path / "bundle.tar.gz")})


def test_a_sidecar_starts_with_what_was_in_force_when_its_engine_refuses_what_is_new(
    tmp_path: Path, policy: Policy
) -> None:
    assert start(policy, tmp_path / "state")[:2] == ("r1", [])
    release(tmp_path / "bundle.tar.gz", "r2", **FORMLESS)
    for _ in range(2):
        revision, refused, status = start(policy, tmp_path / "state")
        assert (revision, refused) == ("r1", ["main"])
        assert "does not do what pdp/budget/limits is there for" in status["bundles"][0]["error"]


def test_a_sidecar_that_never_had_another_does_not_start_with_what_its_engine_refuses(
    tmp_path: Path, policy: Policy
) -> None:
    release(tmp_path / "bundle.tar.gz", "r2", **FORMLESS)
    with pytest.raises(BundleError, match="does not do what"):
        start(policy, tmp_path / "state")
