"""The file of the permit keys can not be read, and is mended with a new key in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdp.permit.ring import KeyRing
from tests.faults.matrix.machine import Machine, Trouble
from tests.faults.matrix.stand import Stand, wait_for
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import walk

pytestmark = pytest.mark.slow
COMPLAINT = "The keys that were read before stay in force."


@dataclass(frozen=True, slots=True, kw_only=True)
class Signing:
    """A sidecar whose key file is replaced now and then."""

    stand: Stand
    key_file: Path
    machine: Machine

    def log(self) -> str:
        return self.stand.sidecar.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signing]:
    folder = tmp_path_factory.mktemp("keys")
    key_file = folder / "permit-key.pem"
    KeyRing.generate().write(key_file)
    config = {"permit": {"key_file": str(key_file)}}
    with (
        Machine(folder, key_file) as machine,
        Stand(folder, config=config, environment=machine.environment) as stand,
    ):
        yield Signing(stand=stand, key_file=key_file, machine=machine)


def gone(file: Path) -> None:
    file.unlink()


def garbled(file: Path) -> None:
    file.write_bytes(b"\x00 no key at all\n" * 50)


def halved(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def opened(file: Path) -> None:
    file.chmod(0o644)


BREAKS: dict[Failure, Callable[[Path], None]] = {
    Failure.DOWN: gone,
    Failure.WRONG_BYTES: garbled,
    Failure.PARTIAL: halved,
    Failure.PERMISSION_LOST: opened,
}


@contextlib.contextmanager
def broken(signing: Signing, how: Callable[[Path], None]) -> Iterator[None]:
    complaints = signing.log().count(COMPLAINT)
    how(signing.key_file)
    wait_for(lambda: signing.log().count(COMPLAINT) > complaints, "noticed")
    yield
    key = KeyRing.generate()
    key.write(signing.key_file)
    wait_for(lambda: key.signing.kid in signing.log(), "signed with the new key")


@contextlib.contextmanager
def hanging(signing: Signing) -> Iterator[None]:
    """The file is looked at, because it has changed, and that does not end."""
    key = KeyRing.generate()
    with signing.machine.disk(Trouble.HANGING):
        before = signing.machine.struck
        key.write(signing.key_file)
        wait_for(lambda: signing.machine.struck > before, "looked at")
        yield
    wait_for(lambda: key.signing.kid in signing.log(), "signed with the new key")


@pytest.mark.parametrize("row", rows_of(Dependency.KEYS), ids=str)
def test_the_keys_that_were_read_last_go_on_signing(signing: Signing, row: Row) -> None:
    if row.failure is Failure.HANGING:
        walk(row, signing.stand, hanging(signing))
    else:
        walk(row, signing.stand, broken(signing, BREAKS[row.failure]))
