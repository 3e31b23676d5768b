"""Whether the sidecar can answer, for probes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from grpc_health.v1 import health, health_pb2

CHECK_SECONDS: Final = 1.0
_log: Final = logging.getLogger(__name__)


class Readiness:
    """Looks once a second, and tells gRPC health what it has seen."""

    def __init__(
        self,
        probes: health.aio.HealthServicer,
        services: Sequence[str],
        *,
        policy_answers: Callable[[], Awaitable[bool]],
        audit_is_healthy: Callable[[], bool],
        keys_are_usable: Callable[[], bool],
    ) -> None:
        self._probes = probes
        self._services = services
        self._ask_policy = policy_answers
        self._audit_is_healthy = audit_is_healthy
        self._keys_are_usable = keys_are_usable
        self.policy_answers = False
        """As last seen."""

    @property
    def ready(self) -> bool:
        """Whether calls get an answer: log and issuers' keys as they are now, the policy as
        last seen.
        """
        return self.policy_answers and self._audit_is_healthy() and self._keys_are_usable()

    async def look(self) -> None:
        """See how things stand, and tell."""
        try:
            self.policy_answers = await self._ask_policy()
        except Exception as error:  # noqa: BLE001 - who can not tell is not ready
            _log.error("whether the policy answers is not known: %s", type(error).__name__)
            self.policy_answers = False
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if self.ready
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in self._services:
            await self._probes.set(service, status)

    async def keep_looking(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self.look()
