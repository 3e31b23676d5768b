"""A bundle to start from: the starter policy, with an example of everything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pdp.policy.archive import refused
from pdp.policy.authoring import schemas

_POLICY: Final = Path(__file__).resolve().parent.parent
_LEFT_OUT: Final = frozenset({"bundle.tar.gz"})
"""What is built from the sources stands beside them in the repository."""


def start(directory: Path) -> list[str]:
    """Write the starter policy into a directory that is empty or not there yet.

    Returns the paths of the files. Raises BundleError, and OSError when it can not be
    written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise refused(str(directory), "is there already, and not an empty directory; name another")
    template = _template()
    files = {
        file.relative_to(template).as_posix(): file
        for file in _files_below(template)
        if file.name not in _LEFT_OUT
    }
    files |= {f"schemas/{file.name}": file for file in _files_below(schemas.FOLDER)}
    for name, source in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return sorted(files)


def _template() -> Path:
    """The starter policy: packaged with the product, or that of the repository."""
    packaged = _POLICY / "template"
    return packaged if packaged.is_dir() else _POLICY.parent.parent / "policies"


def _files_below(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]
