"""One sidecar for every story that needs no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdp.client import Guard
from pdp.testing import SidecarProcess
from tests.field.world import prepared


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    audit = {"record_policy_input": True}  # so that a candidate can be asked the same
    with prepared(tmp_path_factory.mktemp("field"), audit=audit) as sidecar:
        yield sidecar


@pytest.fixture
def guard(sidecar: SidecarProcess) -> Iterator[Guard]:
    with Guard(sidecar.target, timeout_seconds=20) as guard:
        yield guard
