"""The bundles that were in force last, on disk, so that a sidecar starts without their sources."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object
from pdp.policy.archive import Files, pack, read_archive
from pdp.policy.engine import BundleError
from pdp.private_files import make_directory

_log: Final = logging.getLogger(__name__)
MAX_REVISIONS: Final = 256
"""How many earlier revisions of a bundle are remembered, to know a rollback by."""
_STATE: Final = "state.json"
_STATE_BYTES: Final = 256 * 1024
_DRAFT: Final = ".new"
_ARCHIVE: Final = re.compile(r"[0-9]{1,3}\.tar\.gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One bundle as it was accepted. Its signatures are checked again when it is used."""

    chain: tuple[Files, ...] = field(repr=False)
    """A whole bundle, and the delta bundles upon it."""
    tag: str
    """What its source calls it."""
    sequence: int | None
    """How new it says it is; none that is lower is accepted after it."""
    revisions: tuple[str, ...]
    """Every revision that was accepted, the latest last."""
    checked_at: float
    """When its source last said that this is what it holds: Unix seconds."""


class LastGood:
    """A folder for each bundle. One process at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> Kept | None:
        """What was kept of a bundle; None where nothing was, or nothing that can be read."""
        folder = self._directory / name
        if not (folder / _STATE).exists():
            return None
        try:
            state = self._state(name)
            chain = tuple(
                read_archive((folder / _archive_name(file)).read_bytes(), place=str(folder / file))
                for file in _texts(state["archives"])
            )
            return Kept(
                chain=chain,
                tag=_text(state["tag"]),
                sequence=_sequence(state["sequence"]),
                revisions=_texts(state["revisions"]),
                checked_at=float(_text(state["checked_at"])),
            )
        except (OSError, JsonError, BundleError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s can not be used: %s", folder, type(error).__name__)
            return None

    def write(self, name: str, kept: Kept) -> None:
        """Keep a bundle in place of the one before; after a crash it is the one or the
        other. Raises OSError, NotPrivateError, and BundleError when it can not be packed.
        """
        folder = self._directory / name
        make_directory(self._directory)
        make_directory(folder)
        self._tidy(name)  # what a crash, or a full disk, left of an earlier try
        names = _archive_names(folder, len(kept.chain))
        for file, files in zip(names, kept.chain, strict=True):
            _write(folder / file, pack(files))
        state: JsonObject = {
            "archives": list(names),
            "tag": kept.tag,
            "sequence": kept.sequence,
            "revisions": list(kept.revisions),
            "checked_at": repr(kept.checked_at),
        }
        _write(folder / _STATE, json.dumps(state).encode())
        self._tidy(name)

    def confirm(self, name: str, checked_at: float) -> None:
        """Note that the source still holds what was kept. Raises OSError, JsonError."""
        state = self._state(name)
        state["checked_at"] = repr(checked_at)
        _write(self._directory / name / _STATE, json.dumps(state).encode())

    def _tidy(self, name: str) -> None:
        """Delete what the state does not name."""
        try:
            named = set(_texts(self._state(name)["archives"]))
        except (FileNotFoundError, JsonError, KeyError, TypeError):
            named = set()
        for file in list((self._directory / name).iterdir()):
            if _ARCHIVE.fullmatch(file.name.removesuffix(_DRAFT)) and file.name not in named:
                file.unlink()

    def _state(self, name: str) -> JsonObject:
        content = (self._directory / name / _STATE).read_bytes()
        return parse_object(content, max_bytes=_STATE_BYTES)


def _archive_names(folder: Path, count: int) -> list[str]:
    """Names that no file in the folder has: what is kept stays as it is till the end."""
    taken = {file.name for file in folder.iterdir()}
    free = (name for number in range(1000) if (name := f"{number}.tar.gz") not in taken)
    return [next(free) for _ in range(count)]


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it, also after power loss."""
    draft = path.with_name(path.name + _DRAFT)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _archive_name(value: str) -> str:
    if not _ARCHIVE.fullmatch(value):
        raise ValueError("not the name of an archive")
    return value


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _texts(value: JsonValue) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return tuple(_text(item) for item in value)


def _sequence(value: JsonValue) -> int | None:
    if value is not None and not isinstance(value, int):
        raise TypeError("not a whole number")
    return value
