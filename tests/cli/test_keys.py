"""`pdp keys` with whatever id a key has."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdp.cli.app import app
from pdp.permit.ring import KeyRing


@pytest.fixture
def ring() -> KeyRing:
    """A key that signs, and one whose id begins with a hyphen."""
    found = KeyRing.generate().with_next()
    while not found.keys[1].kid.startswith("-"):
        found = KeyRing((found.keys[0],)).with_next()
    return found


def test_a_key_id_that_looks_like_an_option_is_a_key_id(ring: KeyRing, tmp_path: Path) -> None:
    file = tmp_path / "permit-key.pem"
    ring.write(file)
    signing, other = (key.kid for key in ring.keys)
    used = CliRunner().invoke(app, ["keys", "use", other, "--file", str(file)])
    assert used.exit_code == 0, used.output
    assert KeyRing.from_file(file).signing.kid == other
    retired = CliRunner().invoke(app, ["keys", "retire", "--file", str(file), signing])
    assert retired.exit_code == 0, retired.output
    back = CliRunner().invoke(app, ["keys", "retire", other, "--file", str(file)])
    assert back.exit_code == 2, "it signs"
