"""A folder on a disk that loses power: what was not synced is there, or not, or torn.

Processes run with ``disk_recorder.c`` preloaded, which writes down what they change and
sync. From that comes what the disk may hold when the power goes: all that was synced;
of the rest each write, whole, in part or not at all, whatever their order; and of each
folder's names the changes up to some moment, since file systems keep those in order.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
_RECORDER: Final = Path(__file__).with_name("disk_recorder.c")


def compiler() -> str | None:
    """The C compiler, where there is one."""
    return shutil.which("cc")


class Disk:
    """The disk under ``root``. Its log and the recorder lie in ``tools``."""

    def __init__(self, root: Path, tools: Path) -> None:
        self._root = root
        self._log = tools / "disk.log"
        recorder = tools / "disk_recorder.so"
        cc = compiler()
        assert cc is not None, "no C compiler"
        subprocess.run(
            [cc, "-O2", "-shared", "-fPIC", "-o", recorder, _RECORDER, "-ldl"], check=True
        )
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(recorder),
            "DISK_RECORDER_ROOT": str(root),
            "DISK_RECORDER_LOG": str(self._log),
        }
        self.settle()

    def settle(self) -> None:
        """All that is there now is on disk."""
        self._live: dict[int, _File | _Folder] = {}
        self._syncs: dict[str, int] = {}
        self._top = self._scan(self._root)
        self._log.write_bytes(b"")

    def lose_power(self, dice: random.Random) -> int:
        """Put in place what the disk may hold, once all that wrote there are dead; how many
        changes were not synced.
        """
        self._replay(self._log.read_bytes())
        lost = sum(len(each.pending) for each in self._live.values())
        draw = dice.choice((_none, _all, _some(dice), _some(dice), _some(dice)))
        state = self._top.after(draw)
        for path in self._root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        for name, held in state.items():
            if isinstance(held, _Folder):
                held.write(self._root / name, draw)
        self.settle()
        return lost

    def _scan(self, path: Path) -> _Folder:
        folder = _Folder()
        self._live[path.stat().st_ino] = folder
        for entry in path.iterdir():
            if entry.is_dir():
                folder.names[entry.name] = self._scan(entry)
            elif entry.is_file():
                file = _File(content=entry.read_bytes())
                self._live[entry.stat().st_ino] = folder.names[entry.name] = file
        return folder

    def _replay(self, log: bytes) -> None:
        at = 0
        while (end := log.find(b"\n", at)) >= 0:
            kind, *words = log[at:end].decode().split(" ")
            data = b""
            if kind == "write":
                begin, end = end + 1, end + 1 + int(words[2])
                data = log[begin:end]
                if log[end : end + 1] != b"\n":
                    return  # killed while it was written down
            self._take(kind, words, data, at)
            at = end + 1

    def _take(self, kind: str, words: list[str], data: bytes, number: int) -> None:
        match kind, words:
            case "sync-begins", [name, _]:
                self._syncs[name] = number
            case "sync-ended", [name, inode]:
                self._live[int(inode)].sync(self._syncs.pop(name))
            case "create" | "mkdir", [parent, inode, name]:
                made = _File() if kind == "create" else _Folder()
                self._live[int(inode)] = made
                self._folder(parent).pending.append((number, _Naming(name, made)))
            case "rename", [parent, inode, old, new]:
                change = _Naming(new, self._live[int(inode)], instead_of=old)
                self._folder(parent).pending.append((number, change))
            case "unlink", [parent, name]:
                self._folder(parent).pending.append((number, _Naming(name, None)))
            case "write", [inode, offset, _]:
                self._file(inode).pending.append((number, _Write(int(offset), data)))
            case "truncate", [inode, size]:
                self._file(inode).pending.append((number, _Write(int(size), None)))
            case _:
                raise AssertionError(f"{kind} {words} is no record")

    def _file(self, inode: str) -> _File:
        found = self._live[int(inode)]
        assert isinstance(found, _File)
        return found

    def _folder(self, inode: str) -> _Folder:
        found = self._live[int(inode)]
        assert isinstance(found, _Folder)
        return found


@dataclass(frozen=True, slots=True)
class _Write:
    offset: int
    data: bytes | None
    """None: what lies past the offset is cut off."""

    def sectors(self) -> list[_Write]:
        """The parts of it that a disk writes as a whole."""
        if self.data is None:
            return [self]
        first = SECTOR_BYTES - self.offset % SECTOR_BYTES
        edges = [0, *range(first, len(self.data), SECTOR_BYTES), len(self.data)]
        return [
            _Write(self.offset + begin, self.data[begin:end])
            for begin, end in itertools.pairwise(edges)
        ]

    def apply(self, content: bytearray) -> None:
        size = len(content)
        if size < self.offset:
            content.extend(bytes(self.offset - size))
        if self.data is None:
            del content[self.offset :]
        else:
            content[self.offset : self.offset + len(self.data)] = self.data


@dataclass(frozen=True, slots=True)
class _Naming:
    name: str
    held: _File | _Folder | None
    """None: the name is gone."""
    instead_of: str = ""


@dataclass(frozen=True, slots=True)
class _Draw:
    """What of the changes that were not synced is there."""

    of_writes: Callable[[list[_Write]], list[_Write]]
    of_names: Callable[[int], int]
    """How many of so many, from the first."""


_none: Final = _Draw(lambda _: [], lambda _: 0)
_all: Final = _Draw(lambda writes: writes, lambda count: count)


def _some(dice: random.Random) -> _Draw:
    def of_writes(writes: list[_Write]) -> list[_Write]:
        kept: list[_Write] = []
        for write in writes:
            fate = dice.choice(("lost", "kept", "torn"))
            if fate == "kept":
                kept.append(write)
            elif fate == "torn":
                kept += [part for part in write.sectors() if dice.random() < 0.5]
        return kept

    return _Draw(of_writes, lambda count: dice.randint(0, count))


@dataclass(slots=True, eq=False)
class _File:
    content: bytes = b""
    """What is synced."""
    pending: list[tuple[int, _Write]] = field(default_factory=list)
    """With their places in the log."""

    def sync(self, until: int) -> None:
        self.content = _written(self.content, [w for at, w in self.pending if at < until])
        self.pending = [(at, write) for at, write in self.pending if at >= until]

    def write(self, path: Path, draw: _Draw) -> None:
        path.write_bytes(_written(self.content, draw.of_writes([w for _, w in self.pending])))
        path.chmod(0o600)


def _written(content: bytes, writes: list[_Write]) -> bytes:
    changed = bytearray(content)
    for write in writes:
        write.apply(changed)
    return bytes(changed)


@dataclass(slots=True, eq=False)
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    """What is synced."""
    pending: list[tuple[int, _Naming]] = field(default_factory=list)

    def sync(self, until: int) -> None:
        self.names = _named(self.names, [n for at, n in self.pending if at < until])
        self.pending = [(at, naming) for at, naming in self.pending if at >= until]

    def after(self, draw: _Draw) -> dict[str, _File | _Folder]:
        kept = [naming for _, naming in self.pending][: draw.of_names(len(self.pending))]
        return _named(self.names, kept)

    def write(self, path: Path, draw: _Draw) -> None:
        path.mkdir(mode=0o700)
        for name, held in self.after(draw).items():
            held.write(path / name, draw)


def _named(names: dict[str, _File | _Folder], namings: list[_Naming]) -> dict[str, _File | _Folder]:
    changed = dict(names)
    for naming in namings:
        changed.pop(naming.instead_of, None)
        if naming.held is None:
            changed.pop(naming.name, None)
        else:
            changed[naming.name] = naming.held
    return changed
