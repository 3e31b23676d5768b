"""How the ledger in Redis names and writes what it keeps. See scripts/prelude.lua."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from pdp.budget.bounds import check_charges, check_limits
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    OnExpiry,
    PartState,
    Receipt,
    Warned,
    Window,
)
from pdp.budget.receipt_json import limit_from_json, limit_to_json
from pdp.budget.windows import WindowBounds
from pdp.reason import ReasonCode
from pdp.redis_store import key_names, names_in_key, organisation_key, tenant_key

KNOWN_LIMITS: Final = 4096
"""Limits whose words are kept at hand."""

MESSAGES: Final[dict[str, str]] = {
    ReasonCode.IDEMPOTENCY_KEY_REUSED: (
        "The key was used before, with other content: make a new key."
    ),
    ReasonCode.BUDGET_UNLIMITED: (
        "No limit applies to a charge: name one for its budget and unit in the policy."
    ),
    ReasonCode.HOLD_NOT_FOUND: "There is no such hold of this actor: check its id.",
    ReasonCode.HOLD_ALREADY_SETTLED: "The hold was settled before: nothing is left to do.",
    ReasonCode.HOLD_ALREADY_RELEASED: "The hold was released before: make a new charge.",
    ReasonCode.HOLD_EXPIRED: "The hold has expired: only a settlement is still taken.",
    ReasonCode.CHARGE_NOT_HELD: (
        "The hold holds nothing of that budget and unit: name only what is held."
    ),
    ReasonCode.REFUND_EXCEEDS_SPEND: (
        "More would be refunded than was settled and is not refunded yet: refund less."
    ),
    ReasonCode.ACCOUNT_NOT_FOUND: (
        "The tenant has no such account that counts spend now: list its accounts."
    ),
    ReasonCode.BUDGET_UNAVAILABLE: (
        "The sum of what is spent would pass 2^53 - 1, which no ledger can count."
    ),
}

_KEPT_UNDER: Final = ("sum", "expiry")
Pair = tuple[str, str]
"""A budget and a unit."""


# Keys


class Place(NamedTuple):
    """Where an amount counts."""

    kind: str
    """Of the account: see scripts/prelude.lua."""
    name: str
    """Of the account, among its owner's."""
    organisation: str = ""
    """Whose the account is; empty: the tenant's."""

    @property
    def counts_spend(self) -> bool:
        """Whether what is settled and refunded counts there."""
        return self.kind in {"r", "c"}

    def keys(self, tenant: str) -> list[str]:
        """The account's and its expiries'."""
        if self.organisation:
            return [
                f"{organisation_key(self.organisation, kind)}:{self.name}" for kind in _KEPT_UNDER
            ]
        return account_keys(tenant, self.name)


def account_keys(tenant: str, name: str) -> list[str]:
    """The keys of a tenant's account, and of its expiries."""
    return [f"{tenant_key(tenant, kind)}:{name}" for kind in _KEPT_UNDER]


def clock_key(tenant: str) -> str:
    """Where the highest time stands that the tenant has seen."""
    return tenant_key(tenant, "clock")


def accounts_key(tenant: str) -> str:
    """The index of the tenant's accounts, by when their windows end."""
    return tenant_key(tenant, "accounts")


def holds_key(tenant: str) -> str:
    """The index of the tenant's open holds, by when they expire."""
    return tenant_key(tenant, "holds")


def hold_key(tenant: str, hold_id: str) -> str:
    """Where a hold or charge stands."""
    return tenant_key(tenant, "hold", hold_id)


def answer_key(account: Account, key: IdempotencyKey) -> str:
    """Where a first answer stands."""
    return tenant_key(account.tenant, "answer", account.actor, key.operation, key.key)


def place_of(account: Account, limit: Limit, window: WindowBounds) -> Place:
    """Where a limit counts."""
    # A rate of another time drains otherwise, and so counts apart.
    kind = f"{limit.window}:{limit.seconds}" if limit.seconds else limit.window
    name = key_names(
        limit.id,
        limit.budget,
        limit.unit,
        limit.scope,
        limit.counts_for(account),
        kind,
        str(window.starts_at),
    )
    is_shared = not limit.shared_by(account)
    return Place(_kind(limit), name, account.organisation if is_shared else "")


def _kind(limit: Limit) -> str:
    if limit.window is Window.ROLLING:
        return "g"
    if limit.window is Window.CONCURRENT:
        return "h"
    return "c" if limit.on_expiry is OnExpiry.CHARGE else "r"


def counts_spend(name: str) -> bool:
    """Whether the name could be one of an account that counts spend."""
    *_, window, _ = ["", "", *names_in_key(name)]
    return window in {each.value for each in Window if each.is_calendar}


# Arguments


def flag(value: bool) -> str:  # noqa: FBT001 - the flag itself
    """A truth as the scripts read it."""
    return "1" if value else "0"


def entry_words(place: Place, limit: Limit, window: WindowBounds) -> list[str]:
    """What read_entry reads."""
    ends_at = "" if window.ends_at is None else str(window.ends_at)
    words = _limit_words(limit)
    return [str(window.starts_at), ends_at, place.kind, str(limit.limit), words.period]


def taken_words(place: Place, limit: Limit, amount: int) -> list[str]:
    """What take.lua reads of an entry besides."""
    flags = ("" if limit.enforced else "s") + ("o" if place.organisation else "")
    words = _limit_words(limit)
    return [flags, str(amount), words.bound, words.thresholds, words.shown]


class _LimitWords(NamedTuple):
    period: str
    bound: str
    """Of a rate the burst, of others from which sum on there are warnings."""
    thresholds: str
    shown: str


@functools.lru_cache(maxsize=KNOWN_LIMITS)
def _limit_words(limit: Limit) -> _LimitWords:
    if limit.window is Window.ROLLING:
        return _LimitWords(str(limit.seconds * 1000), str(limit.burst), "", limit_to_json(limit))
    warnings = limit.warnings_at()
    thresholds = " ".join(f"{percent}:{amount}" for percent, amount in warnings)
    bound = str(warnings[0][1]) if warnings else ""
    return _LimitWords("", bound, thresholds, limit_to_json(limit))


def asked_json(taken_id: str, charges: Sequence[Charge]) -> str:
    """An id and charges, as they stand in an answer."""
    return _compact([taken_id, [[each.budget, each.unit, each.amount] for each in charges]])


class Part(NamedTuple):
    """A charge of a hold, and where it counts."""

    charge: Charge
    places: list[Place]

    @property
    def pair(self) -> Pair:
        """The charge's budget and unit."""
        return self.charge.budget, self.charge.unit


def parts_json(charges: Sequence[Charge], limits: Sequence[Limit], places: Sequence[Place]) -> str:
    """The parts of a hold. Rates, which it never touches again, are not among them."""
    counts_in: dict[Pair, list[Sequence[str]]] = {
        (charge.budget, charge.unit): [] for charge in charges
    }
    for limit, place in zip(limits, places, strict=True):
        if place.kind != "g":
            words = place if place.organisation else place[:2]
            counts_in[limit.budget, limit.unit].append(words)
    return _compact(
        [
            [each.budget, each.unit, each.amount, counts_in[each.budget, each.unit]]
            for each in charges
        ]
    )


def decode_parts(text: str) -> list[Part]:
    """The parts again. Raises ValueError and others for what is none."""
    parts = [
        Part(Charge(budget, unit, amount), [Place(*place) for place in places])
        for budget, unit, amount, places in json.loads(text or "[]")
    ]
    check_charges([part.charge for part in parts], least=0)
    return parts


def _compact(value: Any) -> str:  # noqa: ANN401 - any JSON
    return _ENCODER.encode(value)


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


# Replies


class Answer(NamedTuple):
    """What a script that remembers its answer replies."""

    replayed: bool
    note: str
    taken_id: str
    charges: tuple[Charge, ...]
    shown: str
    """The limit that is named beside the numbers."""
    expires_at: int
    over_hold: bool
    late: bool
    refused: int
    retry_after_seconds: int | None
    sections: list[list[str]]
    """What the script itself wrote of its outcome."""


def decode_answer(reply: Sequence[str], asked: str, note: str) -> Answer:
    """What the reply says. Raises LedgerError, and ValueError and others for what is none."""
    kind, *rest = reply
    if kind == "error":
        raise LedgerError(rest[0], MESSAGES[rest[0]])
    replayed = False
    if kind == "first":
        own, note, asked, shown, outcome = rest
        # An answer to this very operation, whose reply was lost, is no earlier one.
        replayed = own == "0"
    elif kind == "done":
        outcome, shown = rest
    else:
        raise ValueError("a reply of no known kind")
    head, *sections = (section.split() for section in outcome.split("|"))
    expires_at, over_hold, late, refused, retry_after = head
    taken_id, fields = json.loads(asked)
    charges = tuple(Charge(*each) for each in fields)
    check_charges(charges, least=0)
    return Answer(
        replayed,
        note,
        str(taken_id),
        charges,
        shown,
        _number(expires_at),
        over_hold == "1",
        late == "1",
        _number(refused),
        _number_or_none(retry_after),
        sections,
    )


def taken_receipt(answer: Answer, applied: Sequence[Limit]) -> Receipt:
    """The receipt for a reservation or charge."""
    states, over, warnings = answer.sections
    refused_by = None
    if answer.refused:
        limit = _limit_in(answer.shown)
        refused_by = decode_state(limit, states[4 * answer.refused - 4 : 4 * answer.refused])
    if answer.replayed:
        states, over, warnings = [], [], []
    return Receipt(
        replayed=answer.replayed,
        note=answer.note,
        id="" if refused_by else answer.taken_id,
        expires_at=answer.expires_at,
        charges=() if refused_by else answer.charges,
        limits=decode_states(applied, states) if states else (),
        refused_by=refused_by,
        retry_after_seconds=answer.retry_after_seconds,
        shadow_refusals=tuple(
            decode_state(applied[_number(number) - 1], words)
            for number, *words in _in_groups(over, 5)
        ),
        warnings=tuple(
            Warned(limit_id=applied[_number(number) - 1].id, percent=_number(percent))
            for number, percent in _in_groups(warnings, 2)
        ),
    )


def ended_receipt(answer: Answer) -> Receipt:
    """The receipt for what was done to a hold."""
    (amounts,) = answer.sections
    charges = answer.charges
    if amounts:
        charges = tuple(
            Charge(charge.budget, charge.unit, _number(amount))
            for charge, amount in zip(charges, amounts, strict=True)
            if amount != "-"
        )
    return Receipt(
        replayed=answer.replayed,
        note=answer.note,
        id=answer.taken_id,
        charges=charges,
        over_hold=answer.over_hold,
        late=answer.late,
    )


def granted_receipt(answer: Answer) -> Receipt:
    """The receipt for a grant."""
    (state,) = answer.sections
    limits = () if answer.replayed else (decode_state(_limit_in(answer.shown), state),)
    return Receipt(replayed=answer.replayed, note=answer.note, limits=limits)


def decode_states(limits: Sequence[Limit], words: Sequence[str]) -> tuple[LimitState, ...]:
    """How limits stand."""
    return tuple(
        decode_state(limit, state)
        for limit, state in zip(limits, _in_groups(words, 4), strict=True)
    )


def decode_state(limit: Limit, words: Sequence[str]) -> LimitState:
    """How a limit stands."""
    spent, held, resets_at, granted = words
    return LimitState(
        limit=limit,
        spent=_number(spent),
        held=_number(held),
        resets_at=_number_or_none(resets_at),
        granted=_number(granted, least=-MAX_AMOUNT),
    )


def order_of_account(name: str) -> tuple[str, str, int, str]:
    """By limit, whose spend counts, and start."""
    limit_id, _, _, _, counts_for, _, starts_at = names_in_key(name)
    return limit_id, counts_for, _number(starts_at), name


def ends_at_of(name: str, score: str) -> str:
    """Where the account's window ends, by its place in the index; empty where never."""
    return score if counts_spend(name) and score != "inf" else ""


def decode_account(name: str, limit_json: str, state: str) -> AccountState:
    """An account."""
    limit = _limit_in(limit_json)
    found = decode_state(limit, state.split())
    *_, counts_for, _, starts_at = names_in_key(name)
    return AccountState(
        id=name,
        limit=limit,
        counts_for=counts_for,
        starts_at=_number(starts_at),
        spent=found.spent,
        held=found.held,
        granted=found.granted,
        resets_at=found.resets_at,
    )


HOLD_FIELDS: Final = 9
"""What holds.lua replies of each hold."""


def decode_hold(key: str, fields: Sequence[str]) -> HoldState | None:
    """The hold or charge under a key; None where there is none any more."""
    made_at, operation, actor, tool, expires_at, state, memo, parts, progress = fields
    if not made_at:
        return None
    charges = [part.charge for part in decode_parts(parts)]
    numbers = [_number(number) for number in progress.split()] or [0] * (3 * len(charges))
    return HoldState(
        id=names_in_key(key)[-1],
        operation=operation,
        actor=actor,
        tool=tool,
        made_at=_number(made_at),
        expires_at=_number(expires_at),
        state=state,
        parts=tuple(
            PartState(charge=charge, settled=settled, refunded=refunded)
            for charge, settled, refunded in zip(charges, numbers[1::3], numbers[2::3], strict=True)
        ),
        memo=memo,
    )


def progress_of_charge(charges: Sequence[Charge]) -> str:
    """What has become of the parts of what is charged at once."""
    return " ".join(f"0 {charge.amount} 0" for charge in charges)


def _in_groups(words: Sequence[str], size: int) -> list[Sequence[str]]:
    return [words[at : at + size] for at in range(0, len(words), size)]


def _limit_in(text: str) -> Limit:
    limit = limit_from_json(text)
    check_limits([limit])
    return limit


def _number(text: str, *, least: int = 0) -> int:
    number = int(text)
    if not least <= number <= MAX_AMOUNT:
        raise ValueError("a number that no script counts to")
    return number


def _number_or_none(text: str) -> int | None:
    return None if text == "-" else _number(text)
