from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdp.config import BundleSettings
from pdp.policy.archive import read_archive, read_directory
from pdp.policy.engine import BundleError
from pdp.policy.sources import open_source
from pdp.policy.sources.path import MAX_TRIES, PathSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import archive, fetched


def later() -> float:
    """When whatever is there has been there for a while."""
    return time.time() + 60


def source(
    path: Path, meanwhile: Callable[[], object] = lambda: None, clock: Callable[[], float] = later
) -> PathSource:
    """``meanwhile`` happens while the source waits for a directory to settle."""

    def sleep(_seconds: float) -> None:
        meanwhile()

    return PathSource(path, poll_seconds=0.1, sleep=sleep, clock=clock)


def test_a_file_is_fetched_once_for_each_content(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1))
    (first,) = fetched(source(path), None)
    assert first is not None
    assert first.files == {"data.json": b'{"number": 1}'}
    same = source(path)
    assert fetched(same, first.tag, first.tag) == [None, None]
    path.write_bytes(archive(200))
    (second,) = fetched(same, first.tag)
    assert second is not None
    assert second.files == {"data.json": b'{"number": 200}'}
    assert second.tag != first.tag


def test_who_knows_nothing_yet_is_given_what_was_given_before(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1))
    first, again = fetched(source(path), None, None)
    assert first == again
    assert first is not None


def test_a_file_that_is_only_touched_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1))
    watched = source(path)
    (first,) = fetched(watched, None)
    assert first is not None
    os.utime(path, ns=(1, 1))
    assert fetched(watched, first.tag) == [None]


def test_a_change_is_seen_that_keeps_size_time_and_inode(tmp_path: Path) -> None:
    """As `cp --preserve` over a file does."""
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}')
    os.utime(path, ns=(1, 1))
    watched = source(tmp_path)
    (first,) = fetched(watched, None)
    assert first is not None
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:  # times go in steps
        with path.open("r+") as file:
            file.write('{"a": 2}')
        os.utime(path, ns=(1, 1))
    (second,) = fetched(watched, first.tag)
    assert second is not None
    assert second.files == {"data.json": b'{"a": 2}'}


def test_what_changed_just_now_is_not_trusted_to_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes within one step of a file's time, and of one size, look like one."""
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1))
    reads = []

    def read(content: bytes, *, place: str) -> dict[str, bytes]:
        reads.append(1)
        return read_archive(content, place=place)

    monkeypatch.setattr("pdp.policy.sources.path.read_archive", read)
    seconds = [0.0]
    watched = source(path, clock=lambda: path.stat().st_ctime + seconds[0])
    (first,) = fetched(watched, None)
    assert first is not None
    for seconds[0] in (0.05, 0.15, 0.25):
        assert fetched(watched, first.tag) == [None]
    assert len(reads) == 3


def test_a_directory_is_read_anew_when_any_of_its_files_changes(tmp_path: Path) -> None:
    (tmp_path / "tenants").mkdir()
    (tmp_path / "tenants/data.json").write_text('{"a": 1}')
    watched = source(tmp_path)
    (first,) = fetched(watched, None)
    assert first is not None
    assert fetched(watched, first.tag) == [None]
    (tmp_path / "tenants/data.json").write_text('{"a": 200}')
    (second,) = fetched(watched, first.tag)
    assert second is not None
    assert second.files["tenants/data.json"] == b'{"a": 200}'
    (tmp_path / "tenants/data.json").unlink()
    (third,) = fetched(watched, second.tag)
    assert third is not None
    assert third.files == {}


def config_map(directory: Path, **versions: str) -> Callable[[str], None]:
    """A ConfigMap as the kubelet mounts it: files link to ..data/, which links to a folder of
    a version. Returns what puts another version in place.
    """
    for version, text in versions.items():
        (directory / f"..{version}/tenants").mkdir(parents=True)
        for file in ("data.json", "tenants/data.json"):
            (directory / f"..{version}" / file).write_text(text)
            os.utime(directory / f"..{version}" / file, ns=(1, 1))

    def swap(version: str) -> None:
        (directory / "..data_tmp").symlink_to(f"..{version}")
        (directory / "..data_tmp").rename(directory / "..data")

    swap(next(iter(versions)))
    (directory / "data.json").symlink_to("..data/data.json")
    (directory / "tenants").symlink_to("..data/tenants")
    return swap


def test_a_config_map_changes_by_the_swap_of_one_link(tmp_path: Path) -> None:
    swap = config_map(tmp_path, old="1", new="2")
    watched = source(tmp_path)
    (first,) = fetched(watched, None)
    assert first is not None
    assert first.files["data.json"] == b"1"
    assert fetched(watched, first.tag) == [None]
    swap("new")
    (second,) = fetched(watched, first.tag)
    assert second is not None
    assert second.files["data.json"] == b"2"


def test_a_change_is_seen_in_a_folder_that_a_link_leads_to(tmp_path: Path) -> None:
    config_map(tmp_path, old="1")
    reads = []
    watched = source(tmp_path, lambda: reads.append(1))
    (first,) = fetched(watched, None)
    assert first is not None
    (tmp_path / "..old/tenants/data.json").write_text("200")
    fetched(watched, first.tag)
    assert len(reads) == 2


@pytest.mark.parametrize("target", ("..", "."))
def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to(target)
    (tmp_path / "data.json").write_text("1")
    with pytest.raises(BundleError, match="leads in a circle, a/b"):
        fetched(source(tmp_path), None)


def test_what_is_gone_is_an_error_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    watched = source(path)
    with pytest.raises(SourceError, match=r"bundle\.tar\.gz can not be read: No such file"):
        fetched(watched, None)
    path.write_bytes(archive(1))
    (first,) = fetched(watched, None)
    assert first is not None
    path.unlink()
    with pytest.raises(SourceError):
        fetched(watched, first.tag)
    path.write_bytes(archive(1))
    assert fetched(watched, first.tag) == [None]


def test_a_directory_may_vanish_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "data.json").write_text("1")
    watched = source(path)
    (first,) = fetched(watched, None)
    assert first is not None
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="No such file"):
        fetched(watched, first.tag)
    (tmp_path / "elsewhere").rename(path)
    assert fetched(watched, first.tag) == [None]


def test_what_is_no_bundle_is_refused_and_read_once(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1)[:-20])
    settled = []
    watched = source(path, lambda: settled.append(1))
    for _ in range(3):
        with pytest.raises(BundleError, match=r"bundle\.tar\.gz is not a whole \.tar\.gz"):
            fetched(watched, None)
    assert len(settled) == 1
    path.write_bytes(archive(1))
    assert fetched(watched, None) != [None]


def test_a_pipe_is_no_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is neither a file nor a directory"):
        fetched(source(tmp_path / "pipe"), None)


def test_half_of_an_archive_is_no_refusal_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1)[:-20])
    (found,) = fetched(source(path, lambda: path.write_bytes(archive(1))), None)
    assert found is not None
    assert found.files == {"data.json": b'{"number": 1}'}


def once(change: Callable[[], object]) -> Callable[[], None]:
    changes = [change]

    def do() -> None:
        if changes:
            changes.pop()()

    return do


def test_a_directory_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer has replaced one of two files that belong together, and then the other."""
    (tmp_path / "a.json").write_text("newer")
    (tmp_path / "b.json").write_text("old")
    write_other = once(lambda: (tmp_path / "b.json").write_text("newer"))

    def read_then_write(path: Path) -> dict[str, bytes]:
        files = read_directory(path)
        write_other()
        return files

    monkeypatch.setattr("pdp.policy.sources.path.read_directory", read_then_write)
    (found,) = fetched(source(tmp_path), None)
    assert found is not None
    assert found.files == {"a.json": b"newer", "b.json": b"newer"}


def test_a_file_that_was_emptied_is_not_taken_for_its_new_content(tmp_path: Path) -> None:
    """A file system may empty a file before it changes its time."""
    file = tmp_path / "data.json"
    file.touch()
    os.utime(file, ns=(1, 1))
    (found,) = fetched(source(tmp_path, once(lambda: file.write_text("1"))), None)
    assert found is not None
    assert found.files == {"data.json": b"1"}


def test_a_directory_that_changes_all_the_time_is_left_for_later(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("0")
    writes: list[int] = []

    def write() -> None:
        writes.append(1)
        (tmp_path / "data.json").write_text("1" * len(writes))

    watched = source(tmp_path, write)
    with pytest.raises(SourceError, match="changes all the time; write it elsewhere"):
        fetched(watched, None)
    assert len(writes) == MAX_TRIES


def test_the_configuration_opens_a_path(tmp_path: Path) -> None:
    opened = open_source(BundleSettings(path=tmp_path))
    assert isinstance(opened, PathSource)
    assert opened.place == str(tmp_path)


def test_a_path_needs_no_http() -> None:
    """Importing it takes longer than a sidecar has to start."""
    code = "import sys, pdp.policy.sources; print('aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
