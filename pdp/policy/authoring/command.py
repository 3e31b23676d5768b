"""Run the commands of others that check policies: opa and regal."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdp.canonical import JsonValue
from pdp.policy.engine import BundleError
from pdp.reason import ReasonCode

TIMEOUT_SECONDS: Final = 120.0
MAX_SAID: Final = 16 * 1024
"""Characters that are shown of what a command said."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    output: str
    errors: str

    def json(self) -> JsonValue:
        """The JSON that it wrote. Raises BundleError when it wrote other things."""
        try:
            value: JsonValue = json.loads(self.output or self.errors)  # opa check uses stderr
        except ValueError:
            said = (self.errors or self.output).strip()[:MAX_SAID]
            raise BundleError(
                ReasonCode.POLICY_UNAVAILABLE,
                f"A command did not do what it is there for; it said: {said or 'nothing'}",
            ) from None
        return value


def opa_command(given: Path | None) -> Path:
    """The absolute path of the opa command, given or on PATH. Raises BundleError."""
    found = given or shutil.which("opa")
    if found is None:
        raise BundleError(
            ReasonCode.POLICY_UNAVAILABLE,
            "There is no opa command on PATH, which this needs. Install OPA 1.22 or newer, or name"
            " it with --opa.",
        )
    return Path(found).absolute()


def run(
    command: Path,
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Done:
    """Run a command in a folder, with nothing of this process's environment: a variable
    OPA_... would change what it does, and a test could read the others.

    Raises BundleError when it can not be run, or takes too long.
    """
    try:
        done = subprocess.run(  # noqa: S603 - the author's own command
            [command, *arguments],
            cwd=folder,
            env=environment or {},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed(f"did not end within {timeout_seconds:g} seconds", command) from None
    except OSError as error:
        raise _failed(f"can not be run: {error.strerror}", command) from None
    return Done(
        code=done.returncode,
        output=done.stdout.decode(errors="replace"),
        errors=done.stderr.decode(errors="replace"),
    )


def _failed(what: str, command: Path) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The command {command} {what}.")
