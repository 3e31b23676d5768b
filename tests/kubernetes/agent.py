"""An agent in a pod: calls a guarded tool again and again, and writes down what became of
each call. `agent.py TOKEN_FILE CALLS`: 0 calls until SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pdp.client import Guard, PermitDenied

PAUSE_SECONDS = 0.02
"""Between two calls: fewer than a tenant may make in a second."""


def say(line: str) -> None:
    """At once: it may be killed."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    token = Path(sys.argv[1]).read_text(encoding="utf-8").strip()
    calls = int(sys.argv[2])
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    guard = Guard(os.environ["PDP_TARGET"], timeout_seconds=2.0)
    ran = 0

    @guard.tool("orders.read")
    def read(number: int) -> int:
        nonlocal ran
        ran += 1
        return number

    number = 0
    with guard.acting_for(token):
        while not stopping and (not calls or ran < calls):
            number += 1
            time.sleep(PAUSE_SECONDS)
            try:
                read(number)
            except PermitDenied as denial:
                say(f"blocked {denial.reason_code}")
            else:
                say(f"ran {number}")
    say(f"done {ran}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
