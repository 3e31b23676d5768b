"""What belongs to the sidecar is its own, or it does not start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdp.private_files import NotPrivateError, make_directory, write_once


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    make_directory(tmp_path / "a" / "b")


@pytest.mark.parametrize("mode", (0o777, 0o770, 0o702))
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(NotPrivateError, match="can be written by others"):
        make_directory(tmp_path)


def test_another_users_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(NotPrivateError, match="is another user's"):
        make_directory(tmp_path)


def test_a_file_is_written_once_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    write_once(file, lambda: b"first")
    write_once(file, lambda: b"second")
    assert file.read_bytes() == b"first"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / "secret").symlink_to(target)
    write_once(tmp_path / "secret", lambda: b"content")
    assert not target.exists()
    assert not (tmp_path / "secret").is_symlink()
