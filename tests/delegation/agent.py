"""An agent in a process of its own: acts under the delegation that it is sent on its standard
input, calls one tool, and hands on to the next agent as often as it is told.

Writes its permit's tenant, actor and agents, or why the call was refused.
"""

from __future__ import annotations

import subprocess
import sys

from pdp.client import Guard, PermitDenied

UPDATE = {"order_id": "918", "status": "shipped"}
READ = {"order_id": "918"}


def main(target: str, tool: str, hops: int) -> None:
    message = sys.stdin.buffer.read()
    with Guard(target) as guard, guard.accept(message):
        try:
            permit = guard.authorize(tool, UPDATE if tool == "orders.update" else READ)
        except PermitDenied as denied:
            said = denied.reason_code
        else:
            guard.executed(permit)
            said = " ".join((permit.tenant, permit.actor, *permit.agents))
        sys.stdout.write(f"{said}\n")
        sys.stdout.flush()
        if hops:
            tools = ["orders.read", "orders.update"] if hops > 1 else ["orders.read"]
            further = guard.delegate(f"hop-{hops}", tools=tools)
            run(target, tool, hops - 1, message=further.to_message())


def run(target: str, tool: str, hops: int, *, message: bytes) -> None:
    """The next agent. Raises where it fails."""
    subprocess.run(
        [sys.executable, __file__, target, tool, str(hops)], input=message, check=True, timeout=60
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
