"""Redeem permits straight at the store that sidecars share, without asking one of them.

For a tool server that reaches the Redis or Valkey and no sidecar. It needs
``agent-pdp[server]``, and is trusted as the sidecars are: whoever can write there can
spend any permit. A redemption here is in nobody's audit log; the outcome, which the
runtime reports, is.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from pdp.closing import Closing
from pdp.config import RedisSettings
from pdp.permit.claims import Permit, PermitError
from pdp.permit.redis_uses import RedisPermitUses
from pdp.permit_revocation import check_not_revoked
from pdp.reason import ReasonCode
from pdp.redis_store import RedisStore, open_redis
from pdp.revocation.redis import RedisRevocations
from pdp.revocation.revocations import RevocationError, Revocations
from pdp.storage import StorageError

_T = TypeVar("_T")


class StoreRedeemer(Closing):
    """A tool server's own connection to the shared store. Threads may share it, and it
    survives a fork. It stands in the place of a PermitRedeemer in a PermitDoor.
    """

    def __init__(self, settings: RedisSettings, *, timeout_seconds: float = 2.0) -> None:
        """``settings`` are those of the sidecars' ``budget.store``. Nothing is opened before
        the first permit is redeemed.
        """
        self._settings = settings
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def redeem(self, permit: Permit) -> None:
        """Spend a use of the permit; act only after this has returned. Verify it first: a
        :class:`pdp.tool.PermitDoor` does.

        Raises PermitError: permit_used, permit_revoked, permit_mismatch where the permit is
        not redeemed at this store, permit_unavailable, revocations_unavailable.
        """
        opened = self._open()
        if permit.ledger != opened.store.id:
            raise PermitError(
                ReasonCode.PERMIT_MISMATCH,
                "The permit is not redeemed at this store: its sidecar leases from it, or has"
                " another one.",
            )
        check_not_revoked(opened.revocations, permit)
        # One key for all tries of this redemption, which the store's client makes.
        redeeming = opened.uses.redeem(permit, key=str(uuid.uuid4()))
        self._wait(opened.run(redeeming))

    def close(self) -> None:
        """Let go of the connection; the next permit opens it again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened.process == os.getpid():
            opened.close()

    def _open(self) -> _Opened:
        with self._lock:
            if self._opened is None or self._opened.process != os.getpid():
                self._opened = None
                self._opened = _Opened(self._settings)
            return self._opened

    def _wait(self, answer: Future[_T]) -> _T:
        try:
            return answer.result(self._timeout_seconds)
        except TimeoutError:
            raise _unavailable() from None


class _Opened:
    """The store, on an event loop of its own. Raises PermitError where it can not be had."""

    def __init__(self, settings: RedisSettings) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="permit-store", daemon=True
        )
        self._thread.start()
        try:
            self.store: RedisStore = self.run(open_redis(settings)).result()
            self.uses = RedisPermitUses(self.store)
            self.revocations = Revocations(RedisRevocations(self.store))
            self.run(self.revocations.look()).result()
        except (StorageError, RevocationError):
            self._end()
            raise _unavailable() from None
        self._looking = self.run(self.revocations.keep_looking())

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self._looking.cancel()
        self.run(self.store.close()).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _unavailable() -> PermitError:
    return PermitError(
        ReasonCode.PERMIT_UNAVAILABLE,
        "The shared store could not be asked, so the permit is not spent for sure; try again.",
    )
