"""The way that every row is gone: well, broken, mended, and the books are right."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import pytest

from tests.faults.matrix.stand import Stand, wait_for
from tests.faults.matrix.table import OK, Recovery, Row

RECORD: Final = "MATRIX_RECORD"
"""Names the file, in the environment, where each row notes how long its recovery took."""


def walk(
    row: Row,
    stand: Stand,
    broken: AbstractContextManager[None],
    *,
    call: Callable[[], str] | None = None,
) -> None:
    """Show one row. ``broken`` breaks what is to fail, and mends it when it is left;
    ``call`` makes one call in place of the guarded one.
    """
    call = call or stand.call

    def ends_with(*codes: str) -> None:
        seen: list[str] = []

        def asked() -> bool:
            seen.append(call())
            return seen[-1] in codes

        wait_for(asked, f"{row}: one of {codes}", seen)

    ends_with(OK)
    broken_at = time.monotonic()
    with broken:
        if row.grace:
            assert call() == OK
        if not row.goes_on:
            ends_with(*row.codes)
        if row.ready is not None:
            assert call() in row.codes
            wait_for(lambda: stand.ready() is row.ready, f"ready: {row.ready}")
        mended_at = time.monotonic()
    ends_with(OK)
    if not row.goes_on:
        began = broken_at if row.recovery is Recovery.UNAIDED else mended_at
        note_recovery(row, time.monotonic() - began)
    wait_for(stand.ready, "ready again")
    stand.check_books()


def note_recovery(row: Row, seconds: float) -> None:
    """Where a record is wanted, put down how long the recovery of a row took."""
    path = os.environ.get(RECORD)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps([str(row), round(seconds, 2)]) + "\n")


@contextlib.contextmanager
def unable_to_start(
    stand: Stand, broken: AbstractContextManager[None], *, complaint: str
) -> Iterator[None]:
    """The sidecar is stopped, and what is broken then keeps it from starting, with this
    complaint. It starts once that is mended.
    """
    stand.sidecar.terminate()
    with broken:
        with pytest.raises(RuntimeError, match=complaint):
            stand.sidecar.start()
        yield
    stand.sidecar.start()


@contextlib.contextmanager
def overwritten(file: Path, content: bytes) -> Iterator[None]:
    """The file holds something else."""
    kept = file.read_bytes()
    file.write_bytes(content)
    yield
    file.write_bytes(kept)
