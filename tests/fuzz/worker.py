"""Fuzz one target in this process: the engine is libFuzzer, by atheris, and goes where the
coverage of pdp grows. Its arguments are passed on.

    python -m tests.fuzz.worker TARGET [-max_total_time=60] [folder of inputs] ...
"""

from __future__ import annotations

import shlex
import sys

import atheris  # type: ignore[import-untyped]

from tests.fuzz import contract


def main() -> None:
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=["pdp"]):
        target = contract.load(name)

    def one_input(data: bytes) -> None:
        contract.run(target, data)

    # libFuzzer runs this again by a shell, for each part of a merge.
    again = f"{shlex.quote(sys.executable)} -m tests.fuzz.worker {name}"
    atheris.Setup([again, *arguments], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
