"""The fail-closed matrix: what becomes of calls when something they need fails.

Every dependency meets every failure. What the tests beside this file show is a
:class:`Row`; what can not come to pass, or is shown elsewhere, is an :class:`Omission` and
says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

OK: Final = "ok"


class Dependency(Enum):
    """What a decision needs."""

    ENGINE = "engine"
    LEDGER = "ledger"
    REDIS = "Redis"
    KEYS = "permit keys"
    JWKS = "issuer's keys (JWKS)"
    AUDIT = "audit disk"
    CLOCK = "clock"
    BUNDLE = "bundle source"


class Failure(Enum):
    """How it fails."""

    DOWN = "down"
    SLOW = "slow"
    HANGING = "hanging"
    WRONG_BYTES = "wrong bytes"
    PARTIAL = "partial"
    FULL_DISK = "full disk"
    PERMISSION_LOST = "permission lost"
    KILLED = "killed"
    PAUSED = "paused"
    CLOCK_BACK = "clock back"
    CLOCK_FORWARD = "clock forward"


class Recovery(Enum):
    """What it takes until calls are answered as before."""

    BY_ITSELF = "by itself, once mended"
    UNAIDED = "by itself; nothing to mend"
    NOT_NEEDED = "nothing stops"
    RESTART = "mend it, then start the sidecar again"
    STARTED_AGAIN = "whoever runs the sidecar starts it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One failure of one dependency."""

    dependency: Dependency
    failure: Failure
    how: str
    """How the test brings it about."""
    codes: tuple[str, ...]
    """What guarded calls may end with while it lasts. With any but ok no tool runs."""
    recovery: Recovery
    ready: bool | None
    """What /readyz says while it lasts; None where it is over too soon to tell."""
    grace: bool = False
    """Calls go on for a while with what was known before."""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.dependency.name}-{self.failure.name}".lower().replace("_", "-")

    @property
    def goes_on(self) -> bool:
        """Whether calls are answered as if nothing were the matter."""
        return self.codes == (OK,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Omission:
    """A pair that no test brings about."""

    dependency: Dependency
    failure: Failure
    why: str


def row_of(dependency: Dependency, failure: Failure) -> Row:
    """The row of that pair."""
    [found] = [row for row in ROWS if (row.dependency, row.failure) == (dependency, failure)]
    return found


def rows_of(dependency: Dependency) -> list[Row]:
    """The rows of one dependency."""
    return [row for row in ROWS if row.dependency is dependency]


_E: Final = Dependency.ENGINE
_ENGINE: Final = (
    Row(
        dependency=_E,
        failure=Failure.DOWN,
        how="OPA's port takes no connections",
        codes=("policy_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_E,
        failure=Failure.SLOW,
        how="OPA's answers take 3 s",
        codes=("policy_timeout",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_E,
        failure=Failure.HANGING,
        how="OPA's connections stay open and carry nothing",
        codes=("policy_timeout",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_E,
        failure=Failure.WRONG_BYTES,
        how="something else answers in OPA's place, with 200 and no JSON",
        codes=("policy_unavailable",),
        recovery=Recovery.BY_ITSELF,
        # It is asked for its health, which a stranger may say it has.
        ready=True,
        note="OPA's health is a status, and whoever answers in its place may say 200",
    ),
    Row(
        dependency=_E,
        failure=Failure.PARTIAL,
        how="OPA's answers are cut off after 40 bytes",
        codes=("policy_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_E,
        failure=Failure.PERMISSION_LOST,
        how="OPA answers 403",
        codes=("policy_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_E,
        failure=Failure.KILLED,
        how="SIGKILL to the managed OPA",
        codes=("policy_unavailable",),
        recovery=Recovery.UNAIDED,
        ready=None,
        note="the sidecar starts it again",
    ),
    Row(
        dependency=_E,
        failure=Failure.PAUSED,
        how="SIGSTOP to the managed OPA",
        codes=("policy_timeout",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
)

_L: Final = Dependency.LEDGER
_LEDGER: Final = (
    Row(
        dependency=_L,
        failure=Failure.DOWN,
        how="every access to the ledger's files fails (EIO)",
        codes=("budget_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=True,
        note="pdp_ledger_failures_total shows it",
    ),
    Row(
        dependency=_L,
        failure=Failure.SLOW,
        how="each write and sync of the ledger takes 50 ms",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="calls take as much longer",
    ),
    Row(
        dependency=_L,
        failure=Failure.HANGING,
        how="no write of the ledger ends",
        codes=("pdp_unavailable", "deadline_exceeded"),
        recovery=Recovery.BY_ITSELF,
        ready=True,
        note="each call ends at its own deadline",
    ),
    Row(
        dependency=_L,
        failure=Failure.WRONG_BYTES,
        how="ledger.db is overwritten while the sidecar is stopped",
        codes=("pdp_unavailable",),
        recovery=Recovery.RESTART,
        ready=False,
        note="it does not start (exit 3), and says which file",
    ),
    Row(
        dependency=_L,
        failure=Failure.PARTIAL,
        how="of each write of the ledger a half arrives (EIO)",
        codes=("budget_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=True,
    ),
    Row(
        dependency=_L,
        failure=Failure.FULL_DISK,
        how="the file system of the ledger is full",
        codes=("budget_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=True,
    ),
    Row(
        dependency=_L,
        failure=Failure.PERMISSION_LOST,
        how="the file system of the ledger becomes read-only (EROFS)",
        codes=("budget_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=True,
    ),
    Row(
        dependency=_L,
        failure=Failure.KILLED,
        how="SIGKILL to the sidecar, of which the ledger is a part",
        codes=("pdp_unavailable",),
        recovery=Recovery.STARTED_AGAIN,
        ready=False,
        note="it ended with the process; nothing that was answered is lost",
    ),
    Row(
        dependency=_L,
        failure=Failure.PAUSED,
        how="SIGSTOP to the sidecar, of which the ledger is a part",
        codes=("pdp_unavailable", "deadline_exceeded"),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_L,
        failure=Failure.CLOCK_BACK,
        how="the sidecar's clock goes back by a day",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="limits of a window count in that day's again",
    ),
    Row(
        dependency=_L,
        failure=Failure.CLOCK_FORWARD,
        how="the sidecar's clock goes forward by a day",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="open holds end; what their tools report is counted all the same",
    ),
)

_R: Final = Dependency.REDIS
_REDIS: Final = (
    *(
        Row(
            dependency=_R,
            failure=failure,
            how=how,
            # The second after ten seconds, since nobody can tell who is revoked.
            codes=("budget_unavailable", "revocations_unavailable"),
            recovery=Recovery.BY_ITSELF,
            ready=True,
            note=note,
        )
        for failure, how, note in (
            (
                Failure.DOWN,
                "its port takes no connections",
                "after 10 s nobody can tell who is revoked, and that is said first",
            ),
            (Failure.SLOW, "its answers take 3 s", ""),
            (Failure.HANGING, "its connections stay open and carry nothing", ""),
            (Failure.WRONG_BYTES, "something that does not speak RESP answers", ""),
            (Failure.PARTIAL, "its answers are cut off after 3 bytes", ""),
            (
                Failure.FULL_DISK,
                "the file system of its append-only file is full",
                "Redis itself refuses writes",
            ),
            (Failure.PERMISSION_LOST, "its user may run no command any more (ACL)", ""),
            (Failure.KILLED, "SIGKILL; started again with what it kept", ""),
            (Failure.PAUSED, "SIGSTOP", ""),
        )
    ),
    Row(
        dependency=_R,
        failure=Failure.CLOCK_BACK,
        how="the clock of the Redis server goes back by a day",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="budgets go by this clock, on all sidecars",
    ),
    Row(
        dependency=_R,
        failure=Failure.CLOCK_FORWARD,
        how="the clock of the Redis server goes forward by a day",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="open holds end; what their tools report is counted all the same",
    ),
)

_K: Final = Dependency.KEYS
_KEYS: Final = tuple(
    Row(
        dependency=_K,
        failure=failure,
        how=how,
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="the keys that were read before go on signing; the log says what is wrong",
    )
    for failure, how in (
        (Failure.DOWN, "the key file is gone"),
        (Failure.HANGING, "the key file has changed, and opening it does not end"),
        (Failure.WRONG_BYTES, "the key file holds something else"),
        (Failure.PARTIAL, "the key file holds the first half of a key"),
        (Failure.PERMISSION_LOST, "the key file is open to others (0644), and so refused"),
    )
)

_J: Final = Dependency.JWKS
_JWKS: Final = (
    *(
        Row(
            dependency=_J,
            failure=failure,
            how=how,
            codes=("keys_unavailable",),
            recovery=Recovery.BY_ITSELF,
            ready=False,
            grace=True,
        )
        for failure, how in (
            (Failure.DOWN, "its port takes no connections"),
            (Failure.SLOW, "its answers take 8 s"),
            (Failure.HANGING, "its connections stay open and carry nothing"),
            (Failure.WRONG_BYTES, "it answers 200 with something else"),
            (Failure.PARTIAL, "its answers are cut off after 40 bytes"),
            (Failure.PERMISSION_LOST, "it answers 403"),
            (Failure.KILLED, "SIGKILL to the server; another one is started"),
            (Failure.PAUSED, "SIGSTOP to the server"),
        )
    ),
    Row(
        dependency=_J,
        failure=Failure.CLOCK_BACK,
        how="the sidecar's clock goes back by a day, under tokens that are valid for weeks",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="the age of keys goes by a clock that nobody can set",
    ),
    Row(
        dependency=_J,
        failure=Failure.CLOCK_FORWARD,
        how="the sidecar's clock goes forward by a day, under tokens that are valid for weeks",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="the age of keys goes by a clock that nobody can set",
    ),
)

_A: Final = Dependency.AUDIT
_AUDIT: Final = (
    Row(
        dependency=_A,
        failure=Failure.DOWN,
        how="every access to the audit log fails (EIO)",
        codes=("audit_unavailable",),
        recovery=Recovery.RESTART,
        ready=False,
        note="after a sync that failed nobody can tell what the disk holds, so the log is closed",
    ),
    Row(
        dependency=_A,
        failure=Failure.SLOW,
        how="each write and sync of the audit log takes 50 ms",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="calls take as much longer",
    ),
    Row(
        dependency=_A,
        failure=Failure.HANGING,
        how="no write of the audit log ends",
        codes=("pdp_unavailable", "deadline_exceeded"),
        recovery=Recovery.BY_ITSELF,
        ready=True,
        note="each call ends at its own deadline",
    ),
    Row(
        dependency=_A,
        failure=Failure.WRONG_BYTES,
        how="a record is changed while the sidecar is stopped",
        codes=("pdp_unavailable",),
        recovery=Recovery.RESTART,
        ready=False,
        note="it does not start (exit 3), and says which record",
    ),
    Row(
        dependency=_A,
        failure=Failure.PARTIAL,
        how="of each write of the audit log a half arrives (EIO)",
        codes=("audit_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_A,
        failure=Failure.FULL_DISK,
        how="the file system of the audit log is full",
        codes=("audit_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_A,
        failure=Failure.PERMISSION_LOST,
        how="the file system of the audit log becomes read-only (EROFS)",
        codes=("audit_unavailable",),
        recovery=Recovery.BY_ITSELF,
        ready=False,
    ),
    Row(
        dependency=_A,
        failure=Failure.CLOCK_BACK,
        how="the sidecar's clock goes back by a day",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="records are in the order of their numbers, not of their times",
    ),
    Row(
        dependency=_A,
        failure=Failure.CLOCK_FORWARD,
        how="the sidecar's clock goes forward by a day",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
    ),
)

_C: Final = Dependency.CLOCK
_CLOCK: Final = (
    Row(
        dependency=_C,
        failure=Failure.CLOCK_BACK,
        how="the sidecar's clock goes back by two hours, under tokens that were just issued",
        codes=("permit_expired",),
        recovery=Recovery.BY_ITSELF,
        ready=True,
        note="permits are of the past when they come to the stub, which runs nothing then",
    ),
    Row(
        dependency=_C,
        failure=Failure.CLOCK_FORWARD,
        how="the sidecar's clock goes forward by two hours, under tokens for one",
        codes=("token_expired",),
        recovery=Recovery.BY_ITSELF,
        ready=True,
    ),
)

_B: Final = Dependency.BUNDLE
_BUNDLE: Final = (
    *(
        Row(
            dependency=_B,
            failure=failure,
            how=how,
            codes=("policy_stale",),
            recovery=Recovery.BY_ITSELF,
            ready=False,
            grace=True,
        )
        for failure, how in (
            (Failure.DOWN, "its port takes no connections"),
            (Failure.SLOW, "its answers take 4 s, of 1 s that it has"),
            (Failure.HANGING, "its connections stay open and carry nothing"),
            (Failure.WRONG_BYTES, "it answers 200 with something else"),
            (Failure.PARTIAL, "its answers are cut off after 40 bytes"),
            (Failure.PERMISSION_LOST, "it answers 403"),
            (Failure.KILLED, "SIGKILL to the server; another one is started"),
            (Failure.PAUSED, "SIGSTOP to the server"),
        )
    ),
    Row(
        dependency=_B,
        failure=Failure.FULL_DISK,
        how="the file system of state_dir/policy is full, and there is a new bundle",
        codes=(OK,),
        recovery=Recovery.NOT_NEEDED,
        ready=True,
        note="the new bundle is in force; a restart would begin with the one before",
    ),
    *(
        Row(
            dependency=_B,
            failure=failure,
            how=how,
            codes=("policy_stale",),
            recovery=Recovery.UNAIDED,
            ready=None,
            note="stale until the source is looked at again (poll_seconds)",
        )
        for failure, how in (
            (Failure.CLOCK_BACK, "the sidecar's clock goes back by a day"),
            (Failure.CLOCK_FORWARD, "the sidecar's clock goes forward by a day"),
        )
    ),
)

ROWS: Final[tuple[Row, ...]] = (
    *_ENGINE,
    *_LEDGER,
    *_REDIS,
    *_KEYS,
    *_JWKS,
    *_AUDIT,
    *_CLOCK,
    *_BUNDLE,
)

_NO_CLOCK: Final = "it has no time of its own; the policy is told the sidecar's: see clock"
_NO_PROCESS: Final = "it is a file, which the sidecar reads: see ledger"
_PART_OF_IT: Final = "it is a part of the sidecar's process: see ledger"

OMISSIONS: Final[tuple[Omission, ...]] = (
    Omission(dependency=_E, failure=Failure.FULL_DISK, why="OPA keeps what it is given in memory"),
    Omission(dependency=_E, failure=Failure.CLOCK_BACK, why=_NO_CLOCK),
    Omission(dependency=_E, failure=Failure.CLOCK_FORWARD, why=_NO_CLOCK),
    Omission(
        dependency=_K,
        failure=Failure.SLOW,
        why="it is read beside the calls, and only when it has changed: as hanging",
    ),
    Omission(
        dependency=_K,
        failure=Failure.FULL_DISK,
        why="the sidecar only reads it; `pdp keys` replaces it whole or not at all",
    ),
    Omission(dependency=_K, failure=Failure.KILLED, why=_NO_PROCESS),
    Omission(dependency=_K, failure=Failure.PAUSED, why=_NO_PROCESS),
    Omission(
        dependency=_K,
        failure=Failure.CLOCK_BACK,
        why="keys have no time; permits are refused outside theirs",
    ),
    Omission(
        dependency=_K,
        failure=Failure.CLOCK_FORWARD,
        why="keys have no time; permits are refused outside theirs",
    ),
    Omission(
        dependency=_J, failure=Failure.FULL_DISK, why="nothing of it is kept on the sidecar's disk"
    ),
    Omission(dependency=_A, failure=Failure.KILLED, why=_PART_OF_IT),
    Omission(dependency=_A, failure=Failure.PAUSED, why=_PART_OF_IT),
    *(
        Omission(dependency=_C, failure=failure, why="a clock can only be wrong")
        for failure in Failure
        if failure not in (Failure.CLOCK_BACK, Failure.CLOCK_FORWARD, Failure.PAUSED)
    ),
    Omission(
        dependency=_C,
        failure=Failure.PAUSED,
        why="a machine that was suspended goes on with its clock forward",
    ),
)
