"""Go through the whole matrix and write its page: ``python -m tests.faults.matrix``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.faults.matrix.page import PAGE, TIMES, page
from tests.faults.matrix.walk import RECORD

_OPTIONS: Final = ("-m", "slow", "--quiet", "--numprocesses=2", "--dist=loadscope")


def main() -> int:
    """0 if every row has passed, and both files are written."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "times"
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", str(Path(__file__).parent), *_OPTIONS],
            env={**os.environ, RECORD: str(record)},
            check=False,
        )
        if ran.returncode:
            return ran.returncode
        times = dict(json.loads(line) for line in record.read_text("utf-8").splitlines())
    TIMES.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(times), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
