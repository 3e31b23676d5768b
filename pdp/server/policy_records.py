"""What becomes of policies, on record and counted."""

from __future__ import annotations

import logging
from typing import Final

from pdp.audit.record import AuditError, AuditLog, AuditRecord, Outcome
from pdp.canonical import JsonObject, JsonValue
from pdp.errors import PdpError
from pdp.policy.shadow import Answered, Difference
from pdp.reason import ReasonCode
from pdp.server.metrics import Metrics

_log: Final = logging.getLogger(__name__)


class PolicyRecords:
    """Writes down what the policy room tells of; nothing of it is lost to a failure there.

    ``audit`` is None until the log is open; nothing happens before.
    """

    def __init__(self, metrics: Metrics, *, action: str = "policy") -> None:
        self._metrics = metrics
        self._action = action
        self.audit: AuditLog | None = None

    async def activated(self, revision: str) -> None:
        """A revision is in force now."""
        if self._action == "policy":
            self._metrics.policy_is(revision)
        await self._append(
            outcome=Outcome.ACTIVATED, reason_code=ReasonCode.OK, policy_revision=revision
        )

    async def refused(self, bundle: str, error: PdpError) -> None:
        """A source held what may not be used."""
        self._metrics.bundle_refused(bundle)
        await self._append(
            outcome=Outcome.REFUSED,
            reason_code=error.reason_code,
            detail={"bundle": bundle, "error": error.message[:_MAX_ERROR_LENGTH]},
        )

    def unreachable(self, bundle: str) -> None:
        """A source could not be read."""
        self._metrics.bundle_unreachable(bundle)

    async def differs(self, difference: Difference) -> None:
        """The candidate would have answered otherwise. Raises AuditError."""
        if self.audit is None:
            return
        subject = difference.document["subject"]
        action = difference.document["action"]
        context = difference.document["context"]
        assert isinstance(subject, dict)  # noqa: S101 - the sidecar made the document
        assert isinstance(action, dict)  # noqa: S101 - the sidecar made the document
        assert isinstance(context, dict)  # noqa: S101 - the sidecar made the document
        properties = subject["properties"]
        assert isinstance(properties, dict)  # noqa: S101 - the sidecar made the document
        fields: list[JsonValue] = [*difference.fields]
        await self.audit.append(
            AuditRecord(
                type="shadow",
                tenant_id=str(properties["tenant"]),
                actor_id=str(subject["id"]),
                action=str(action["name"]),
                outcome=Outcome.DENIED if difference.candidate.allow is False else Outcome.ALLOWED,
                reason_code=difference.candidate.said,
                request_id=str(context["request_id"]) or None,
                policy_revision=difference.candidate.revision,
                detail={
                    "entrypoint": difference.entrypoint.value,
                    "differs": fields,
                    "active": _shown(difference.active),
                },
            )
        )

    async def _append(
        self,
        *,
        outcome: Outcome,
        reason_code: str,
        policy_revision: str | None = None,
        detail: JsonObject | None = None,
    ) -> None:
        if self.audit is None:
            return
        try:
            await self.audit.append(
                AuditRecord(
                    type="policy",
                    tenant_id=None,
                    actor_id=None,
                    action=self._action,
                    outcome=outcome,
                    reason_code=reason_code,
                    policy_revision=policy_revision,
                    detail=detail,
                )
            )
        except AuditError as error:
            # Every call is refused meanwhile; the policy is not what is wrong.
            _log.error("a change of the policy is not on record: %s", error.message)


_MAX_ERROR_LENGTH: Final = 2_000


def _shown(answered: Answered) -> JsonObject:
    shown: JsonObject = {"policy_revision": answered.revision, "reason_code": answered.said}
    if answered.allow is not None:
        shown["allow"] = answered.allow
    return shown
