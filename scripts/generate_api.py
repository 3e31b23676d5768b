"""Generate pdp/api from proto/, or check with --check that it is current.

Files keep their proto names (pdp/v1/...), so reflection shows the contract as it
is written; only the Python imports are moved below pdp.api.
"""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "pdp" / "api"
VENV_BIN = Path(sys.executable).parent


def generate(target: Path) -> None:
    """Write the stubs and their type stubs below ``target``."""
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in ROOT.glob("proto/**/*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"--proto_path={ROOT / 'proto'}",
                f"--plugin=protoc-gen-mypy={VENV_BIN / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={VENV_BIN / 'protoc-gen-mypy_grpc'}",
                f"--python_out={scratch}",
                f"--grpc_python_out={scratch}",
                f"--mypy_out=quiet:{scratch}",
                f"--mypy_grpc_out=quiet:{scratch}",
                *protos,
            ],
            check=True,
        )
        for source in sorted(Path(scratch, "pdp").rglob("*.py*")):
            text = source.read_text(encoding="utf-8")
            text = re.sub(r"\bfrom pdp\.(v1|spiffe)\b", r"from pdp.api.\1", text)
            text = re.sub(r"\bpdp\.(v1|spiffe)\.(\w+_pb2)\b", r"pdp.api.\1.\2", text)
            destination = target / source.relative_to(Path(scratch, "pdp"))
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_text(text, encoding="utf-8")
    for folder in (target, target / "v1", target / "spiffe"):
        text = '"""Generated from proto/ by scripts/generate_api.py; nothing here by hand."""\n'
        (folder / "__init__.py").write_text(text, encoding="utf-8")


def main() -> int:
    """Generate, or compare and say which files differ."""
    if sys.argv[1:] != ["--check"]:
        generate(TARGET)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {path.relative_to(scratch) for path in Path(scratch).rglob("*.py*")}
        kept = {
            path.relative_to(TARGET)
            for path in TARGET.rglob("*.py*")
            if "__pycache__" not in path.parts
        }
        names = sorted(map(str, fresh | kept))
        _, mismatch, errors = filecmp.cmpfiles(scratch, TARGET, names, shallow=False)
    if mismatch or errors:
        print(
            "pdp/api differs from proto/: run `make proto`.",
            *mismatch,
            *errors,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    print("pdp/api is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
