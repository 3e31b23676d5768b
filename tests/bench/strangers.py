"""Systems to be measured that are not what they should be."""

from __future__ import annotations

from bench.peers.question import Call


class AllowsAll:
    def ask(self, call: Call) -> bool:
        return True


class Fails:
    def ask(self, call: Call) -> bool:
        raise RuntimeError("no answer today")
