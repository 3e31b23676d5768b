"""What the policy lets each tenant use of the sidecar itself (pdp/sidecar/service_class).

Admission asks for every call, before anything is done for it, so no call waits for this
answer: the policy is asked in the background, once for each tenant and revision.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from pdp.admission import Priority, ServiceClass
from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import ActivePolicy, Entrypoint, PolicyError
from pdp.reason import ReasonCode

MAX_TENANTS: Final = 10_000
"""Tenants whose class is kept; the one that was not seen for longest is forgotten."""
RETRY_SECONDS: Final = 10.0
"""When a question is asked again that the engine could not take or not finish."""
MOST: Final = 100_000
"""Largest number that an answer may hold, as in the configuration."""
LEAST_PER_SECOND: Final = 0.01
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAnswer:
    """What the policy says of one tenant; None leaves it to the configuration."""

    priority: Priority
    max_concurrent_calls: int | None = None
    calls_per_second: float | None = None
    burst: int | None = None

    def within(self, configured: ServiceClass) -> ServiceClass:
        """The class that results. Who writes the policy may lower what the operator lets
        each tenant use, and never lift it; whose turn it is takes nothing from that.
        """
        return ServiceClass(
            priority=self.priority,
            max_concurrent_calls=min(
                self.max_concurrent_calls or configured.max_concurrent_calls,
                configured.max_concurrent_calls,
            ),
            calls_per_second=min(
                self.calls_per_second or configured.calls_per_second, configured.calls_per_second
            ),
            burst=min(self.burst or configured.burst, configured.burst),
        )


def service_class_input(tenant: str) -> JsonObject:
    """The input for pdp/sidecar/service_class: nothing of any caller."""
    return {"subject": {"properties": {"tenant": tenant}}}


def parse_service_class(value: JsonValue) -> ServiceAnswer:
    """The value of pdp/sidecar/service_class. Raises PolicyError (policy_invalid)."""
    if not isinstance(value, dict) or "priority" not in value or not value.keys() <= _KEYS:
        raise _invalid(f"it must be an object with priority, and of {', '.join(sorted(_KEYS))}")
    priority = value["priority"]
    if not isinstance(priority, str) or priority not in set(Priority):
        raise _invalid(f"priority must be one of {', '.join(Priority)}")
    return ServiceAnswer(
        priority=Priority(priority),
        max_concurrent_calls=_whole(value, "max_concurrent_calls"),
        calls_per_second=_number(value, "calls_per_second", least=LEAST_PER_SECOND),
        burst=_whole(value, "burst"),
    )


_KEYS: Final = frozenset({"priority", "max_concurrent_calls", "calls_per_second", "burst"})


def _whole(answer: JsonObject, key: str) -> int | None:
    """Accepts 1.0 for 1, as JSON knows one kind of number only."""
    number = _number(answer, key, least=1)
    if number is None:
        return None
    if number != int(number):
        raise _invalid(f"{key} must be a whole number")
    return int(number)


def _number(answer: JsonObject, key: str, *, least: float) -> float | None:
    if key not in answer:
        return None
    number = answer[key]
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise _invalid(f"{key} must be a number")
    if not least <= number <= MOST:
        raise _invalid(f"{key} must be from {least} to {MOST}")
    return number


def _invalid(what: str) -> PolicyError:
    return PolicyError(
        ReasonCode.POLICY_INVALID, f"The policy's answer is not of the agreed form: {what}."
    )


@dataclass(slots=True)
class _Known:
    """What is known of one tenant."""

    service: ServiceClass
    revision: str | None = None
    """The policy revision that it follows from; None before the first answer."""
    ask_again_at: float = math.inf


class ServiceClasses:
    """The class of each tenant, as of the policy in force.

    A tenant's first calls have the configured class, and those that come while a new
    revision is yet to be asked have the former one. Where the policy says nothing, fails,
    or answers in another form, the class is the configured one.
    """

    def __init__(
        self,
        policy: ActivePolicy,
        configured: ServiceClass,
        *,
        failed: Callable[[str], None],
        max_tenants: int = MAX_TENANTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``failed`` is told the reason code of each answer that can not be used."""
        self._policy = policy
        self._configured = configured
        self._failed = failed
        self._max_tenants = max_tenants
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """The one that was seen last is last."""
        self._waiting: dict[str, None] = {}
        """The tenants that the policy is yet to be asked about; the first one may be the
        one that it is being asked about."""
        self._wanted = asyncio.Event()
        self._told_of: str | None = None
        """The revision whose failure was logged."""

    def of(self, tenant: str) -> ServiceClass:
        """What a verified tenant may use now. Never waits, and never raises."""
        known = self._known.get(tenant)
        if known is None:
            known = self._known[tenant] = _Known(self._configured)
            if len(self._known) > self._max_tenants:
                forgotten, _ = self._known.popitem(last=False)
                self._waiting.pop(forgotten, None)
        else:
            self._known.move_to_end(tenant)
        if known.revision != self._policy.revision or self._clock() >= known.ask_again_at:
            self._waiting[tenant] = None
            self._wanted.set()
        return known.service

    @contextlib.asynccontextmanager
    async def kept_current(self) -> AsyncIterator[None]:
        """Ask the policy, about one tenant at a time, until the context ends."""
        asking = asyncio.create_task(self._keep_asking())
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _keep_asking(self) -> None:
        while True:
            await self._wanted.wait()
            while self._waiting:
                tenant = next(iter(self._waiting))
                answered = await self._ask(tenant)
                self._waiting.pop(tenant, None)
                if tenant in self._known:
                    self._known[tenant] = answered
            self._wanted.clear()

    async def _ask(self, tenant: str) -> _Known:
        known = _Known(self._configured, self._policy.revision)
        try:
            with self._policy.pin() as engine:
                try:
                    value = await engine.evaluate(
                        Entrypoint.SERVICE_CLASS, service_class_input(tenant)
                    )
                finally:
                    known.revision = engine.revision
            known.service = parse_service_class(value).within(self._configured)
        except PolicyError as error:
            if error.reason_code in _PASSING:
                known.ask_again_at = self._clock() + RETRY_SECONDS
            if error.reason_code != ReasonCode.POLICY_UNDEFINED:
                self._tell(known.revision, error.reason_code, error.message)
        except Exception as error:  # noqa: BLE001 - admission goes on, whatever it is
            self._tell(known.revision, ReasonCode.POLICY_ERROR, type(error).__name__)
        return known

    def _tell(self, revision: str | None, reason_code: str, message: str) -> None:
        self._failed(reason_code)
        if self._told_of == revision:
            return
        self._told_of = revision
        _log.warning(
            "the policy %s gives no service class to some tenant, which has that of"
            " limits.tenants: %s (`pdp policy check` shows for which)",
            revision,
            message,
        )


_PASSING: Final = frozenset(
    {ReasonCode.POLICY_UNAVAILABLE, ReasonCode.POLICY_TIMEOUT, ReasonCode.POLICY_STALE}
)
"""What says nothing of the revision's answer."""
