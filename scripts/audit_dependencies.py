"""Look every pinned dependency up in the database of known weaknesses, with pip-audit.

Exit codes: 0 all were looked up and none is known to be weak, 1 some are, 2 some could not be
looked up, which is no good news: pip-audit itself ends with 0 then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
LOCKS: Final = tuple(ROOT / "requirements" / f"{name}.txt" for name in ("server", "demo", "dev"))
CLEAN, WEAK, UNKNOWN = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known of the packages of one lock file."""

    looked_up: int
    weak: tuple[str, ...]
    unknown: tuple[str, ...]
    """Why packages could not be looked up."""


def audit(lock: Path, pip_audit: Path) -> Findings:
    """Ask about all that a lock file pins. Where the answer is none, nothing is known."""
    command = [str(pip_audit), "--require-hashes", "--disable-pip", "--progress-spinner", "off"]
    ran = subprocess.run(
        [*command, "--format", "json", "--requirement", str(lock)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return read(json.loads(ran.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError):
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Findings(0, (), (f"{lock.name}: pip-audit gave no answer: {last}",))


def read(dependencies: Iterable[dict[str, Any]]) -> Findings:
    """What pip-audit's JSON says. Raises KeyError where it is not of the known form."""
    looked_up, weak, unknown = 0, list[str](), list[str]()
    for each in dependencies:
        if "skip_reason" in each:
            unknown.append(str(each["skip_reason"]))
            continue
        looked_up += 1
        weak += [
            f"{each['name']} {each['version']}: {found['id']}, fixed in"
            f" {', '.join(found['fix_versions']) or 'no version yet'}"
            for found in each["vulns"]
        ]
    if not looked_up and not unknown:
        unknown.append("pip-audit found nothing to look up")
    return Findings(looked_up, tuple(weak), tuple(unknown))


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit the lock files, tell what was found, and say it by exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("locks", nargs="*", type=Path, default=LOCKS)
    parser.add_argument(
        "--pip-audit", type=Path, default=Path(sys.executable).with_name("pip-audit")
    )
    given = parser.parse_args(arguments)
    weak = unknown = False
    for lock in given.locks:
        found = audit(lock, given.pip_audit)
        print(f"{lock.name}: {found.looked_up} looked up, {len(found.weak)} known weaknesses")
        for line in found.weak:
            print(f"  {line}")
        if found.unknown:
            print(f"  {len(found.unknown)} could not be looked up, the first: {found.unknown[0]}")
        weak, unknown = weak or bool(found.weak), unknown or bool(found.unknown)
    if unknown:
        print("The database was not reached, or not for all: of the rest nothing is known.")
    if weak:
        return WEAK
    return UNKNOWN if unknown else CLEAN


if __name__ == "__main__":
    raise SystemExit(main())
