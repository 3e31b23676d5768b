"""Delegate: make a narrower identity for an agent that acts on the caller's behalf."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, NamedTuple

from pdp.admission import Lane
from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import Charge, IdempotencyKey, LedgerError
from pdp.canonical import JsonObject, JsonValue, canonical_bytes, sha256_hex
from pdp.errors import PdpError, RequestError
from pdp.identity.delegation import TYPE, DelegationIssuer, claims_of
from pdp.identity.resolver import Credentials
from pdp.identity.signature import MAX_TOKEN_LENGTH
from pdp.identity.subject import Delegation, Link, Subject
from pdp.permit import jws
from pdp.permit.keys import PublicKeys
from pdp.reason import ReasonCode
from pdp.rooms import Rooms, admitted_as, charges_json, identify, identity_json, isolate

ACTION: Final = "delegate"
MAX_NAMES_BYTES: Final = 1_024
"""Of all agents that act one for another: every permit names them, and must stay short
enough to be read.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegationRequest:
    """A narrower identity that is asked for, well-formed and within bounds."""

    request_id: str
    """The caller's idempotency key."""
    delegate: str
    """The agent's name."""
    tools: tuple[str, ...]
    """At least one, each once."""
    arguments: JsonObject = field(repr=False)
    """By tool, one of ``tools``, and argument, the rule that it must keep besides."""
    ttl_seconds: int
    """0 takes the configured default."""
    budget: tuple[Charge, ...]
    """Each pair of budget and unit once; empty for what the caller may."""
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegated:
    """The narrower identity, on record."""

    token: str = field(repr=False)
    subject: Subject
    """As whom the agent will be seen."""
    receipt: AuditReceipt
    replayed: bool


class DelegationError(PdpError):
    """It is not delegated: delegation_too_wide, delegation_too_deep, token_expired."""


class _Terms(NamedTuple):
    """What the first try has settled, and every further try of it repeats."""

    id: str
    issued_at: int
    expires_at: int


async def delegate(rooms: Rooms, credentials: Credentials, asked: DelegationRequest) -> Delegated:
    """Make a delegation. Returns only after it is on record, as is every refusal. Raises
    DelegationError, RequestError, LedgerError, IdentityError, AdmissionError and AuditError.
    """
    subject = await identify(
        rooms, credentials, action=ACTION, request_id=asked.request_id, trace_id=asked.trace_id
    )
    async with admitted_as(
        rooms,
        Lane.QUESTIONS,
        subject,
        action=ACTION,
        request_id=asked.request_id,
        trace_id=asked.trace_id,
    ):
        return await _delegate(rooms, subject, asked)


async def _delegate(rooms: Rooms, subject: Subject, asked: DelegationRequest) -> Delegated:
    failure: PdpError | None = None
    child, token, replayed = subject, "", False
    try:
        terms = _terms(rooms, subject, asked)
        child, token = _signed(rooms, subject, asked, terms)
        first = await rooms.ledger.reserve(
            isolate(subject, tool=""),
            IdempotencyKey(
                operation="delegate",
                key=asked.request_id,
                content_sha256=_content_sha256(subject, asked),
                note=json.dumps(terms),
            ),
            charges=(),
            limits=(),
            ttl_seconds=1,
        )
        replayed = first.replayed
        if replayed:
            child, token = _signed(rooms, subject, asked, _Terms(*json.loads(first.note)))
    except (DelegationError, RequestError, LedgerError) as error:
        failure = error
    receipt = await rooms.audit.append(
        AuditRecord(
            type="decision",
            tenant_id=subject.tenant,
            actor_id=subject.actor,
            identity=identity_json(subject),
            action=ACTION,
            outcome=Outcome.ALLOWED if failure is None else Outcome.DENIED,
            reason_code=ReasonCode.OK if failure is None else failure.reason_code,
            request_id=asked.request_id,
            trace_id=asked.trace_id,
            detail=_detail(asked, child if failure is None else None),
            replayed=replayed or None,
        )
    )
    if failure is not None:
        raise failure
    return Delegated(token=token, subject=child, receipt=receipt, replayed=replayed)


def _terms(rooms: Rooms, subject: Subject, asked: DelegationRequest) -> _Terms:
    """Raises DelegationError and RequestError."""
    longest = rooms.delegation.max_ttl_seconds
    if asked.ttl_seconds > longest:
        raise RequestError("ttl_seconds", f"must be at most {longest} here")
    issued_at = int(rooms.clock())
    expires_at = issued_at + (asked.ttl_seconds or min(rooms.delegation.ttl_seconds, longest))
    if subject.expires_at:
        expires_at = min(expires_at, int(subject.expires_at))
    if expires_at <= issued_at:
        raise DelegationError(
            ReasonCode.TOKEN_EXPIRED, "The caller's own token has expired: get a new one first."
        )
    return _Terms(rooms.new_id(), issued_at, expires_at)


def _signed(
    rooms: Rooms, subject: Subject, asked: DelegationRequest, terms: _Terms
) -> tuple[Subject, str]:
    """The child, and its token: the same for the same terms, as long as the same key signs.
    Raises DelegationError and RequestError.
    """
    child = narrowed(
        subject,
        asked,
        link=Link(
            id=terms.id,
            agent=asked.delegate,
            budget=tuple((each.budget, each.unit, each.amount) for each in asked.budget),
            expires_at=terms.expires_at,
        ),
        max_depth=rooms.delegation.max_depth,
        ledger_id=rooms.ledger_id,
    )
    agents = child.delegation.agents if child.delegation is not None else ()
    if sum(len(agent.encode("utf-8")) for agent in agents) > MAX_NAMES_BYTES:
        raise RequestError(
            "delegate", f"makes the names of all agents longer than {MAX_NAMES_BYTES} bytes"
        )
    claims = claims_of(child, issuer=rooms.permits.issuer, issued_at=terms.issued_at)
    token = rooms.permits.sign_as(TYPE, claims)
    if len(token) > MAX_TOKEN_LENGTH:
        raise RequestError(
            "tools",
            f"makes a token of more than {MAX_TOKEN_LENGTH} characters, with all that it stands"
            " on: name fewer tools, rules or budgets, or shorter agents",
        )
    return child, token


def narrowed(
    subject: Subject, asked: DelegationRequest, *, link: Link, max_depth: int, ledger_id: str
) -> Subject:
    """The subject as whom the agent acts: within the caller's own delegation in everything.
    Raises DelegationError.
    """
    parent = subject.delegation
    links = parent.links if parent is not None else ()
    if len(links) >= max_depth:
        raise DelegationError(
            ReasonCode.DELEGATION_TOO_DEEP,
            f"At most {max_depth} agents act one for another here: let one of them do more.",
        )
    if parent is not None and not parent.tools.issuperset(asked.tools):
        raise _too_wide("tool")
    for each in links:
        _check_slice(each, link)
    has_slices = any(each.budget for each in links)
    return replace(
        subject,
        token_id=link.id,
        expires_at=float(link.expires_at),
        delegation=Delegation(
            links=(*links, link),
            tools=frozenset(asked.tools),
            arguments=_rules(parent, asked),
            root_token_id=parent.root_token_id if parent is not None else subject.token_id,
            # All slices of a chain are counted in one place: where the first one is.
            ledger=parent.ledger if parent is not None and has_slices else ledger_id,
        ),
    )


def _check_slice(parent: Link, link: Link) -> None:
    """Raises DelegationError where a budget is not the parent's, or is more of it."""
    if not parent.budget:
        return
    most = {(budget, unit): amount for budget, unit, amount in parent.budget}
    for budget, unit, amount in link.budget:
        if amount > most.get((budget, unit), 0):
            raise _too_wide("budget")


def _too_wide(what: str) -> DelegationError:
    return DelegationError(
        ReasonCode.DELEGATION_TOO_WIDE,
        f"A {what} is asked for that was not delegated to the caller, or not so much of it: ask"
        " for less.",
    )


def _rules(parent: Delegation | None, asked: DelegationRequest) -> JsonObject:
    """The parent's rules for the tools that go on, and those that are asked for besides."""
    rules: JsonObject = {}
    for tool in asked.tools:
        of_parent = parent.arguments.get(tool, {}) if parent is not None else {}
        besides = asked.arguments.get(tool, {})
        arguments: dict[str, list[JsonValue]] = {}
        if isinstance(of_parent, dict):
            arguments = {name: [*_listed(each)] for name, each in of_parent.items()}
        for name, rule in besides.items() if isinstance(besides, dict) else ():
            known = arguments.setdefault(name, [])
            # To Python, true equals 1.
            if canonical_bytes(rule) not in map(canonical_bytes, known):
                known.append(rule)
        if arguments:
            rules[tool] = {**arguments}
    return rules


def _listed(rules: JsonValue) -> Sequence[JsonValue]:
    return rules if isinstance(rules, list) else [rules]


def _content_sha256(subject: Subject, asked: DelegationRequest) -> str:
    """The same for the same request of the same identity, to the letter: all of it goes
    into the token.
    """
    return sha256_hex(
        {
            "identity": identity_json(subject),
            "token_ids": list(subject.token_ids),
            "expires_at": int(subject.expires_at),
            "roles": list(subject.roles),
            "scopes": list(subject.scopes),
            "within": [subject.organisation, subject.team, subject.session],
            "delegate": asked.delegate,
            "tools": list(asked.tools),
            "arguments": asked.arguments,
            "ttl_seconds": asked.ttl_seconds,
            "budget": list(charges_json(asked.budget)),
        }
    )


def _detail(asked: DelegationRequest, child: Subject | None) -> JsonObject:
    """What the record says besides; rules are raw arguments, of which it has only where."""
    detail: JsonObject = {
        "delegate": asked.delegate,
        "tools": list(asked.tools),
        "ttl_seconds": asked.ttl_seconds,
    }
    ruled: JsonObject = {
        tool: [*sorted(rules)] for tool, rules in asked.arguments.items() if isinstance(rules, dict)
    }
    if ruled:
        detail["arguments"] = ruled
    if asked.budget:
        detail["budget"] = list(charges_json(asked.budget))
    if child is not None:
        detail["delegation_id"] = child.token_id
        detail["expires_at"] = int(child.expires_at)
    return detail


def issuer_of(
    name: str,
    keys: PublicKeys,
    *,
    keys_version: Callable[[], object],
    tenants: frozenset[str] | None = None,
    check: Callable[[Subject], None] = lambda _: None,
) -> DelegationIssuer:
    """Who has made a delegation, by the keys that its permits are signed with."""
    return DelegationIssuer(
        name=name,
        verify=partial(jws.verify, find_key=keys.find, kind=TYPE),
        keys_version=keys_version,
        tenants=tenants,
        check=check,
    )
