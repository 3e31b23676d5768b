"""The JSON Schemas of what a policy is asked and of what it answers (pdp/policy/schemas)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).resolve().parent.parent / "schemas"
"""What `opa check --schema` is given."""
ANY_INPUT: Final = FOLDER / "input.json"
"""The input of any rule, for Rego that names no schema itself."""


def schema_names() -> list[str]:
    """The names that :func:`schema_text` takes."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def schema_text(name: str) -> str:
    """One schema, as JSON text. Raises KeyError for a name that there is not."""
    if name not in schema_names():
        raise KeyError(name)
    return (FOLDER / f"{name}.json").read_text(encoding="utf-8")
