"""Build Rego into a bundle that the sidecar runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pdp.policy.engine import Entrypoint


def build_bundle(sources: Path, target: Path, *, opa: str | Path = "opa") -> Path:
    """Build the Rego below ``sources`` into ``target`` (.tar.gz), and return it.

    Raises RuntimeError with what the opa command says.
    """
    command = [str(opa), "build", "--target", "wasm", "--bundle", str(sources)]
    command += ["--ignore", "*_test.rego", "--output", str(target)]
    for entrypoint in Entrypoint:
        command += ["--entrypoint", entrypoint.value]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise RuntimeError(f"the policy does not build:\n{done.stdout}{done.stderr}")
    return target
