"""Put cases to an engine the way a sidecar does: through every step, with real rooms."""

from __future__ import annotations

import hmac
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pdp import decision, spending
from pdp.admission import Admission
from pdp.audit.log import ChainedAuditLog
from pdp.budget.ledger import Charge
from pdp.budget.sqlite import SqliteLedger
from pdp.canonical import JsonObject, JsonValue, sha256_hex
from pdp.config import TenantLimits
from pdp.errors import PdpError
from pdp.identity.jwks_file import JwksFile
from pdp.identity.key_source import FixedKeys
from pdp.identity.principals import Principals
from pdp.identity.resolver import Credentials, IdentityError, Peer
from pdp.identity.tenancy import Routes, TenantRule
from pdp.identity.tokens import Issuer, TokenIdentity
from pdp.identity.workloads import Workloads, WorkloadTokens
from pdp.permit.claims import Permit
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey
from pdp.permit.uses import PermitUses
from pdp.permit.verifier import PermitVerifier
from pdp.policy.engine import ActivePolicy, Entrypoint, PolicyEngine, PolicyError
from pdp.policy.question import Usage
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Revocations
from pdp.rooms import Rooms
from pdp.storage import Durability
from pdp.strangers import Strangers
from pdp.testing.issuer import TokenIssuer

BEGIN: Final = 1_795_521_600.0
A_MONTH_SECONDS: Final = 32 * 86_400.0
"""Between two cases, so that each finds its limits unspent."""
PERMIT_KEY: Final = SigningKey.generate()
DIGEST_KEY: Final = b"k" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call or spend, and what is to come of it."""

    name: str
    token: Mapping[str, Any]
    """Claims: tenant, roles, scopes, and any other."""
    workload: str = ""
    """The workload that asks, which shows it by its certificate."""
    call: Mapping[str, Any] | None = None
    """tool, arguments, and perhaps resource and context."""
    spend: Mapping[str, Any] | None = None
    """operation, charges or usage, and perhaps tool."""
    answer: JsonValue | None = None
    """What the policy is to say first; None where only the reason code counts."""
    reason_code: str = "ok"
    limit_id: str | None = None
    detail: Mapping[str, JsonValue] = field(default_factory=dict)
    """What the record of a spend says besides."""


@dataclass(slots=True)
class Seen:
    """What came of a case."""

    reason_code: str = "ok"
    heard: list[JsonValue] = field(default_factory=list)
    """What the policy said, or the code of why it said nothing, in order."""
    permit: Permit | None = None
    actor: str | None = None
    """Of a token that names no tenant and is good otherwise."""


class Overheard:
    """A policy in force, and what it says."""

    def __init__(self, policy: ActivePolicy) -> None:
        self._policy = policy
        self.heard: list[JsonValue] = []

    @property
    def revision(self) -> str:
        return self._policy.revision

    @contextmanager
    def pin(self) -> Iterator[PolicyEngine]:
        with self._policy.pin() as engine:
            yield _Pinned(engine, self.heard)

    async def changed_from(self, revision: str) -> str:
        raise NotImplementedError


class _Pinned:
    def __init__(self, engine: PolicyEngine, heard: list[JsonValue]) -> None:
        self._engine = engine
        self._heard = heard

    @property
    def revision(self) -> str:
        return self._engine.revision

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        try:
            value = await self._engine.evaluate(entrypoint, document)
        except PolicyError as error:
            self._heard.append(error.reason_code)
            raise
        self._heard.append(value)
        return value

    async def close(self) -> None:
        await self._engine.close()


async def walk(
    cases: Sequence[Case], policy: ActivePolicy, issuer: TokenIssuer, directory: Path
) -> list[Seen]:
    """Put each case to the policy. The audit log is left in ``directory``/audit, its
    times and ids the same whatever engine answers.
    """
    now = BEGIN
    ids = itertools.count(1)

    def clock() -> float:
        return now

    def new_id() -> str:
        return f"id-{next(ids)}"

    overheard = Overheard(policy)
    ledger = SqliteLedger(
        directory / "ledger.db", durability=Durability.PROCESS, clock=clock, new_id=new_id
    )
    uses = PermitUses(directory / "permits.db", durability=Durability.PROCESS, clock=clock)
    audit = ChainedAuditLog(
        directory / "audit",
        instance="pdp-1",
        durability=Durability.PROCESS,
        clock=lambda: int(now) * 1_000_000_000,
    )
    rooms = Rooms(
        admission=Admission(
            max_concurrent_calls=1,
            max_waiting_calls=0,
            classes=lambda _: TenantLimits(burst=100_000).service_class,
        ),
        identity=_identity(issuer, directory, clock),
        policy=overheard,
        ledger=ledger,
        permits=PermitIssuer(PERMIT_KEY, issuer="agent-pdp"),
        permit_verifier=PermitVerifier(
            PERMIT_KEY.public_set, issuer="agent-pdp", audience="tools", clock=clock
        ),
        permit_uses=uses,
        audit=audit,
        digest_key=DIGEST_KEY,
        permit_ttl_seconds=60,
        hold_ttl_seconds=120,
        ledger_id="ledger-1",
        strangers=Strangers(),
        revocations=Revocations(RevocationFile(Path("nowhere"))),
        clock=clock,
        new_id=new_id,
    )
    seen = []
    for number, case in enumerate(cases):
        now = BEGIN + number * A_MONTH_SECONDS
        overheard.heard = []
        seen.append(await _put(rooms, case, number, _bearer(issuer, case, now)))
        seen[-1].heard = overheard.heard
    for room in (audit, ledger, uses):
        await room.close()
    return seen


def arguments_digest(case: Case) -> str:
    """What the audit record says of a call's arguments."""
    assert case.call is not None
    tenant_key = hmac.digest(DIGEST_KEY, case.token["tenant"].encode(), "sha256")
    arguments = sha256_hex(case.call["arguments"]).encode()
    return hmac.digest(tenant_key, arguments, "sha256").hex()


async def _put(rooms: Rooms, case: Case, number: int, credentials: Credentials) -> Seen:
    try:
        if case.call is not None:
            asked = _asked(case.call, number)
            recorded = await decision.authorize(rooms, credentials, asked)
            return Seen(recorded.answer.reason_code, permit=recorded.answer.permit)
        assert case.spend is not None
        operation = {"charge": spending.charge, "reserve": spending.reserve}
        await operation[case.spend["operation"]](rooms, credentials, _spend(case.spend, number))
    except IdentityError as error:
        return Seen(error.reason_code, actor=error.actor)
    except PdpError as error:
        return Seen(error.reason_code)
    return Seen()


def _asked(call: Mapping[str, Any], number: int) -> decision.Asked:
    async def read() -> decision.Question:
        return decision.Question(
            request_id=f"req-{number}",
            tool=call["tool"],
            resource=call.get("resource"),
            arguments=call["arguments"],
            arguments_sha256=sha256_hex(call["arguments"]),
            context=call.get("context", {}),
            audience="tools",
        )

    return decision.Asked(request_id=f"req-{number}", tool=call["tool"], trace_id=None, read=read)


def _spend(spend: Mapping[str, Any], number: int) -> spending.Spend:
    usage = spend.get("usage")
    return spending.Spend(
        idempotency_key=f"req-{number}",
        charges=tuple(Charge(*charge) for charge in spend.get("charges", ())),
        usage=Usage(usage["model"], tuple(usage["quantities"].items())) if usage else None,
        tool=spend.get("tool", ""),
    )


def _identity(issuer: TokenIssuer, directory: Path, clock: Any) -> Principals:
    keys = JwksFile(issuer.write_jwks(directory / "jwks.json")).read_first()
    trusted = Issuer(
        issuer=issuer.issuer,
        audiences=frozenset({issuer.audience}),
        types=frozenset({"jwt"}),
        algorithms=frozenset({"EdDSA"}),
        keys=FixedKeys(keys),
        tenant=TenantRule(claim="tenant_id"),
        team_claim="team",
    )
    workloads = Workloads(required=False, certificates=True, tokens=WorkloadTokens([]))
    return Principals(TokenIdentity([trusted], clock=clock), workloads=workloads, routes=Routes())


def _bearer(issuer: TokenIssuer, case: Case, now: float) -> Credentials:
    claims = {
        name: value
        for name, value in case.token.items()
        if name not in {"tenant", "roles", "scopes"}
    }
    token = issuer.token(
        case.token["tenant"],
        "alice",
        roles=case.token.get("roles", ()),
        scopes=case.token.get("scopes", ()),
        iat=int(now),
        exp=int(now) + 300 + claims.pop("expired", 0),
        **claims,
    )
    uris = (case.workload,) if case.workload else ()
    peer = Peer(certificate_sha256="c" * 43 if uris else "", uris=uris)
    return Credentials(bearer=token, peer=peer)
