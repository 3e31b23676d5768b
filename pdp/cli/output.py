"""How the commands print, for people and for machines."""

from __future__ import annotations

from enum import StrEnum


class Output(StrEnum):
    """For whom a result is written."""

    TEXT = "text"
    """For people."""
    JSON = "json"
    """For machines: JSON."""


def printable(text: str) -> str:
    """A text in one line, without what would act on the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
