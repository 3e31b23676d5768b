"""What is counted, for Prometheus. No tenant is ever a label: their number is not bounded."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from pdp.admission import Admission
from pdp.budget.ledger import Receipt
from pdp.decision import Recorded
from pdp.identity.key_cache import KeyCache
from pdp.policy.live import LivePolicy
from pdp.reason import ReasonCode

_SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
)  # fmt: skip
MAX_REASON_CODES: Final = 128
"""Policies may return codes of their own; more than this many are counted as "other"."""


class Metrics:
    """The sidecar's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reason_codes: set[str] = {code.value for code in ReasonCode}
        self._decisions = Counter(
            "pdp_decisions",
            "Answers to Authorize.",
            ("outcome", "reason_code"),
            registry=self.registry,
        )
        self._calls = Histogram(
            "pdp_call_seconds",
            "Time from request to response, by method and gRPC status.",
            ("method", "status"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._steps = Histogram(
            "pdp_step_seconds",
            "Time of each step of Authorize.",
            ("step",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "pdp_errors",
            "Calls that ended with a status, by reason code.",
            ("method", "reason_code"),
            registry=self.registry,
        )
        self._budget_refusals = Counter(
            "pdp_budget_refusals",
            "Calls that a limit refused.",
            ("method",),
            registry=self.registry,
        )
        self._budget_warnings = Counter(
            "pdp_budget_warnings",
            "Thresholds of limits that were crossed, by percent of the limit.",
            ("percent",),
            registry=self.registry,
        )
        self._budget_shadow_refusals = Counter(
            "pdp_budget_shadow_refusals",
            "Refusals that shadow limits would have made.",
            registry=self.registry,
        )
        self._budget_over_hold = Counter(
            "pdp_budget_over_hold",
            "Settlements of more than was held.",
            registry=self.registry,
        )
        self._budget_late = Counter(
            "pdp_budget_late",
            "Settlements of holds that had expired.",
            registry=self.registry,
        )
        self._admission_refusals = Counter(
            "pdp_admission_refusals",
            "Calls refused as one too many, by what they were too many for: rate, concurrency"
            " (of their tenant), or full (the sidecar).",
            ("kind",),
            registry=self.registry,
        )
        self._service_class_failures = Counter(
            "pdp_service_class_failures",
            "Service classes of the policy that could not be used, by reason code.",
            ("reason_code",),
            registry=self.registry,
        )
        self._calls_waiting = Gauge(
            "pdp_calls_waiting",
            "Calls that wait for their tenant's turn.",
            registry=self.registry,
        )
        self._audit_failures = Counter(
            "pdp_audit_failures",
            "Calls refused because their audit record could not be written.",
            registry=self.registry,
        )
        self._ledger_failures = Counter(
            "pdp_ledger_failures",
            "Calls refused because the ledger could not take them.",
            registry=self.registry,
        )
        self._policy = Info("pdp_policy", "The active policy bundle.", registry=self.registry)
        self._bundle_refusals = Counter(
            "pdp_policy_refusals",
            "Policy bundles that a source held and that may not be used.",
            ("bundle",),
            registry=self.registry,
        )
        self._bundle_failures = Counter(
            "pdp_policy_source_failures",
            "Looks at a bundle's source that failed.",
            ("bundle",),
            registry=self.registry,
        )
        self._policy_activated = Gauge(
            "pdp_policy_activated_timestamp_seconds",
            "When the policy in force was taken up: Unix seconds.",
            registry=self.registry,
        )
        self._policy_checked = Gauge(
            "pdp_policy_checked_timestamp_seconds",
            "When every source last said that this is what it holds: Unix seconds.",
            registry=self.registry,
        )
        self._policy_stale = Gauge(
            "pdp_policy_stale",
            "1 when the sources could not be reached for longer than policy.max_age_seconds.",
            registry=self.registry,
        )
        self._key_fetches = Counter(
            "pdp_key_fetches",
            "Looks at where an issuer's keys are from: ok or failed.",
            ("issuer", "result"),
            registry=self.registry,
        )
        self._key_age = Gauge(
            "pdp_keys_age_seconds",
            "Time since an issuer's keys were last seen where they are from; +Inf for never.",
            ("issuer",),
            registry=self.registry,
        )
        self._shadow = Counter(
            "pdp_shadow_answers",
            "Answers of the candidate: same, differs, or missed because too many waited.",
            ("result",),
            registry=self.registry,
        )
        # To look a label up again costs more than to count under it.
        self._decisions_with = functools.cache(self._decisions.labels)
        self._step = functools.cache(self._steps.labels)
        self._calls_with = functools.cache(self._calls.labels)
        self.calls_under_way = Gauge(
            "pdp_calls_under_way", "Calls that are being answered.", registry=self.registry
        )
        self.streams = Gauge(
            "pdp_streams", "AuthorizeStreams that are open.", registry=self.registry
        )

    def policy_is(self, revision: str) -> None:
        """A policy revision became active."""
        self._policy.info({"revision": revision})

    def policy_times_are(self, live: LivePolicy) -> None:
        """From here on the policy's times are read off it."""
        self._policy_activated.set_function(lambda: live.activated_at)
        self._policy_checked.set_function(lambda: live.checked_at)
        self._policy_stale.set_function(lambda: float(live.stale))

    def calls_wait_for(self, admission: Admission) -> None:
        """From here on the number that waits is read off it."""
        self._calls_waiting.set_function(lambda: admission.waiting)

    def admission_refused(self, kind: str) -> None:
        """A call was one too many: for "rate", "concurrency" or "full"."""
        self._admission_refusals.labels(kind).inc()

    def service_class_failed(self, reason_code: str) -> None:
        """The policy gives a tenant no class that can be used."""
        self._service_class_failures.labels(self._known(reason_code)).inc()

    def budget_refused(self, method: str) -> None:
        """A limit of the policy refused."""
        self._budget_refusals.labels(method).inc()

    def bundle_refused(self, bundle: str) -> None:
        """A source held what may not be used."""
        self._bundle_refusals.labels(bundle).inc()

    def bundle_unreachable(self, bundle: str) -> None:
        """A source could not be read."""
        self._bundle_failures.labels(bundle).inc()

    def keys_are(self, issuer: str, cache: KeyCache) -> None:
        """From here on the age of an issuer's keys is read off them."""
        self._key_age.labels(issuer).set_function(lambda: cache.age_seconds)

    def keys_fetched(self, issuer: str, result: str) -> None:
        """A look at where an issuer's keys are from was "ok" or "failed"."""
        self._key_fetches.labels(issuer, result).inc()

    def shadow_compared(self, result: str) -> None:
        """The candidate's answer is "same", "differs" or "missed"."""
        self._shadow.labels(result).inc()

    def decided(self, recorded: Recorded) -> None:
        """An answer to Authorize left."""
        answer = recorded.answer
        outcome = "denied" if answer.permit is None else "allowed"
        self._decisions_with(outcome, self._known(answer.reason_code)).inc()
        for step, seconds in recorded.step_seconds.items():
            self._step(step).observe(seconds)
        if answer.result is not None:
            self.spent(answer.result)
            if answer.result.refused_by is not None:
                self.budget_refused("Authorize")

    def spent(self, result: Receipt) -> None:
        """The ledger took an operation. What it remembered from before is not counted."""
        if result.replayed:
            return
        for warning in result.warnings:
            self._budget_warnings.labels(str(warning.percent)).inc()
        self._budget_shadow_refusals.inc(len(result.shadow_refusals))
        self._budget_over_hold.inc(result.over_hold)
        self._budget_late.inc(result.late)

    def failed(self, method: str, reason_code: str) -> None:
        """A call ended with an error status."""
        self._refusals.labels(method, self._known(reason_code)).inc()
        if reason_code == ReasonCode.AUDIT_UNAVAILABLE:
            self._audit_failures.inc()
        elif reason_code == ReasonCode.BUDGET_UNAVAILABLE:
            self._ledger_failures.inc()

    @contextmanager
    def timed(self, method: str) -> Iterator[CallTimer]:
        """Counts a call while it is under way, and its time when it ends."""
        timer = CallTimer()
        self.calls_under_way.inc()
        began = time.perf_counter()
        try:
            yield timer
        finally:
            self.calls_under_way.dec()
            self._calls_with(method, timer.status).observe(time.perf_counter() - began)

    def _known(self, reason_code: str) -> str:
        if reason_code not in self._reason_codes:
            if len(self._reason_codes) >= MAX_REASON_CODES:
                return "other"
            self._reason_codes.add(reason_code)
        return reason_code


class CallTimer:
    """The status under which a call's time is counted."""

    def __init__(self) -> None:
        self.status = "CANCELLED"
