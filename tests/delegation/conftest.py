"""One sidecar for all that needs no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdp.testing import SidecarProcess
from tests.delegation.parties import BUNDLE, IDP, MAX_DEPTH


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    config = {
        "delegation": {"max_depth": MAX_DEPTH, "ttl_seconds": 120, "max_ttl_seconds": 600},
        "limits": {
            "tenants": {
                "calls_per_second": 100_000,
                "burst": 100_000,
                "max_concurrent_calls": 100,
            }
        },
    }
    directory = tmp_path_factory.mktemp("delegation")
    with SidecarProcess(directory, issuer=IDP, bundle=BUNDLE, config=config) as sidecar:
        yield sidecar
