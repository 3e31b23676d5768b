"""CSV that a spreadsheet opens without running anything in it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import Final, TextIO

# The last four are the same signs at full width, which some spreadsheets take for them.
_BEGINS_A_FORMULA: Final = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)


def write_csv(out: TextIO, heading: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Write rows under a heading. A cell that a spreadsheet would take for a formula gets
    an apostrophe before it (OWASP, "CSV Injection").
    """
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heading)
    for row in rows:
        writer.writerow(cell(text) for text in row)


def cell(text: str) -> str:
    """A text as it may stand in a cell."""
    return f"'{text}" if text.startswith(_BEGINS_A_FORMULA) else text
