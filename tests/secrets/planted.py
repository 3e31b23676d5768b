"""Secrets that a test has planted, and every place where one of them may have been left."""

from __future__ import annotations

import base64
import threading
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


def spellings(secret: bytes) -> Iterator[bytes]:
    """The ways in which it could have been written down."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    quoted = urllib.parse.quote_from_bytes(secret, safe="").encode()
    if quoted != secret:
        yield quoted
    for before in range(3):  # wherever in a longer text it stood
        encoded = base64.b64encode(b"\0" * before + secret)[4 if before else 0 : -4]
        yield encoded
        yield encoded.translate(bytes.maketrans(b"+/", b"-_"))


@dataclass
class Planted:
    """The secrets, by what they are."""

    secrets: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, secret: str | bytes) -> str:
        """Remember it; of a JWT its payload and its signature by themselves, too."""
        found = secret.encode() if isinstance(secret, str) else secret
        assert len(found) >= 12, f"{name} is too short to be looked for"
        self.secrets[name] = found
        parts = found.split(b".")
        if len(parts) == 3 and found.startswith(b"eyJ"):
            self.secrets[f"{name}, its payload"] = parts[1]
            self.secrets[f"{name}, its signature"] = parts[2]
        return found.decode("utf-8", "replace")

    def in_text(self, place: str, content: bytes) -> list[str]:
        """Which of them stand in there, in whatever spelling."""
        return [
            f"{place} holds {name}"
            for name, secret in self.secrets.items()
            if any(spelling in content for spelling in spellings(secret))
        ]

    def in_files(self, folders: Iterable[Path], *, but: Iterable[Path] = ()) -> list[str]:
        """Which of them stand in a file there, or in its name."""
        left_out = {path.resolve() for path in but}
        found = []
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                found += self.in_text(f"the name of {path.name}", str(path).encode())
                if path.is_file() and path.resolve() not in left_out:
                    found += self.in_text(path.name, path.read_bytes())
        return found


class ChildrenSeen:
    """What stands in /proc of a process and of all below it, looked at all the time."""

    def __init__(self) -> None:
        self.texts: set[bytes] = set()
        self.commands: set[bytes] = set()
        self._roots: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def below(self, pid: int) -> None:
        """Look at this one too."""
        self._roots = {*self._roots, pid}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            for pid in _family(self._roots):
                for name in ("cmdline", "environ"):
                    try:
                        text = Path(f"/proc/{pid}/{name}").read_bytes()
                    except OSError:
                        continue
                    self.texts.add(text)
                    if name == "cmdline":
                        self.commands.add(text)


def _family(roots: set[int]) -> set[int]:
    parents = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                status = (process / "stat").read_bytes()
            except OSError:
                continue
            parents[int(process.name)] = int(status.rpartition(b")")[2].split()[1])
    family = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family
