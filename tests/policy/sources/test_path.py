from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdp.policy.archive import Files
from pdp.policy.engine import BundleError
from pdp.policy.sources.path import PathSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import archive, fetched


def source(path: Path) -> PathSource:
    return PathSource(path, poll_seconds=0.1)


def test_a_file_is_fetched_once_for_each_content(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1))
    (first,) = fetched(source(path), None)
    assert first is not None
    assert first.files == {"data.json": b'{"number": 1}'}
    same = source(path)
    assert fetched(same, first.tag, first.tag) == [None, None]
    path.write_bytes(archive(2))
    (second,) = fetched(same, first.tag)
    assert second is not None
    assert second.files == {"data.json": b'{"number": 2}'}
    assert second.tag != first.tag


def test_a_file_that_is_only_touched_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1))
    watched = source(path)
    (first,) = fetched(watched, None)
    assert first is not None
    os.utime(path, ns=(1, 1))
    assert fetched(watched, first.tag) == [None]


def test_a_directory_is_read_anew_when_any_of_its_files_changes(tmp_path: Path) -> None:
    (tmp_path / "tenants").mkdir()
    (tmp_path / "tenants/data.json").write_text('{"a": 1}')
    watched = source(tmp_path)
    (first,) = fetched(watched, None)
    assert first is not None
    assert fetched(watched, first.tag) == [None]
    (tmp_path / "tenants/data.json").write_text('{"a": 2}')
    (second,) = fetched(watched, first.tag)
    assert second is not None
    assert second.files["tenants/data.json"] == b'{"a": 2}'
    (tmp_path / "tenants/data.json").unlink()
    (third,) = fetched(watched, second.tag)
    assert third is not None
    assert third.files == {}


def test_a_config_map_changes_by_the_swap_of_one_link(tmp_path: Path) -> None:
    """As the kubelet does it: files link to ..data/, which links to a folder of a version."""
    for version in ("1", "2"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}/data.json").write_text(version)
        os.utime(tmp_path / f"..{version}/data.json", ns=(1, 1))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "data.json").symlink_to("..data/data.json")
    watched = source(tmp_path)
    (first,) = fetched(watched, None)
    assert first is not None
    assert first.files == {"data.json": b"1"}
    (tmp_path / "..next").symlink_to("..2")
    (tmp_path / "..next").rename(tmp_path / "..data")
    (second,) = fetched(watched, first.tag)
    assert second is not None
    assert second.files == {"data.json": b"2"}


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


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(1)[:-20])
    with pytest.raises(BundleError, match=r"is not a whole \.tar\.gz"):
        fetched(source(path), None)


class Written(PathSource):
    """A source whose directory is written to while it is read."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(path, poll_seconds=0.1)
        self.writes = writes
        self.reads = 0

    def _read(self) -> Files:
        files = super()._read()
        self.reads += 1
        if self.reads <= self.writes:
            (self._path / "b.json").write_text(str(self.reads))
        return files


def test_a_directory_that_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("0")
    (found,) = fetched(Written(tmp_path, writes=2), None)
    assert found is not None
    assert found.files == {"b.json": b"2"}


def test_a_directory_that_changes_all_the_time_is_left_for_later(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("0")
    with pytest.raises(SourceError, match="changes all the time"):
        fetched(Written(tmp_path, writes=1000), None)


def test_what_was_written_just_now_may_still_be_written(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("0")
    fresh = Written(tmp_path, writes=0)
    (found,) = fetched(fresh, None)
    assert found is not None
    assert fresh.reads > 1
