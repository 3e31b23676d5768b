"""The engine port, and what a policy is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from pdp.canonical import JsonObject, JsonValue
from pdp.errors import PdpError

_T = TypeVar("_T")


class Entrypoint(StrEnum):
    """The rules of a bundle that the sidecar asks for."""

    AUTHZ_DECISION = "pdp/authz/decision"
    BUDGET_DECISION = "pdp/budget/decision"
    BUDGET_LIMITS = "pdp/budget/limits"
    SERVICE_CLASS = "pdp/sidecar/service_class"
    TOOLS_VISIBLE = "pdp/tools/visible"

    @property
    def optional(self) -> bool:
        """Whether a bundle may do without the rule: then it gives no answer, as one that
        is undefined.
        """
        return self in {Entrypoint.SERVICE_CLASS, Entrypoint.TOOLS_VISIBLE}


REQUIRED_ENTRYPOINTS: Final = tuple(name for name in Entrypoint if not name.optional)
"""A bundle that lacks one of these is not loaded."""


class PolicyError(PdpError):
    """A question got no usable answer, which is a denial.

    Reason codes: policy_undefined, policy_invalid, policy_error,
    policy_timeout, policy_unavailable, policy_stale.
    """


class BundleError(PdpError):
    """A bundle can not be loaded: reason code policy_unavailable. The message
    names the file, what is wrong and what to do; it is for operators, whose terminals
    nothing that it quotes of a bundle can steer.
    """

    def __init__(self, reason_code: str, message: str) -> None:
        super().__init__(reason_code, "".join(map(_shown, message)))


def _shown(character: str) -> str:
    fits = character.isprintable() or character in "\n\t"
    return character if fits else "\N{REPLACEMENT CHARACTER}"


class PolicyEngine(Protocol):
    """Evaluates the rules of one loaded bundle."""

    @property
    def revision(self) -> str:
        """The bundle's revision: from its manifest, else a digest of its content."""
        ...

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``.

        Raises PolicyError: policy_undefined when the rule has no value, or when it is
        optional and the bundle lacks it;
        policy_timeout past the deadline, policy_error when it fails while it
        runs, policy_unavailable when the engine can not take the question.
        """
        ...

    async def close(self) -> None:
        """Let go of threads and memory; later questions get policy_unavailable."""
        ...


class WalkedEngine(ABC):
    """An engine that evaluates on threads of its own, and lets others' work go on there.

    No Protocol: every call asks which kind its engine is, and a Protocol takes 6 us to say.
    """

    @abstractmethod
    async def walk(self, steps: Callable[[PolicyEngine], Coroutine[Any, Any, _T]]) -> _T:
        """Run steps on one such thread, off any event loop, with an engine that answers
        there and then. They may wait for a disk, and for nothing else.

        Raises what they raise, and before they begin PolicyError: policy_unavailable when
        no thread can take them. Steps that have begun are finished even if the awaiting
        task is cancelled.
        """


@runtime_checkable
class Supervised(Protocol):
    """An engine that depends on another process."""

    async def healthy(self) -> bool:
        """Whether that process takes questions."""
        ...


class ActivePolicy(Protocol):
    """The policy in force, which a new bundle may replace while calls are under way."""

    @property
    def revision(self) -> str:
        """The revision that the next call gets."""
        ...

    def pin(self) -> AbstractContextManager[PolicyEngine]:
        """One revision for all the questions of one call, until the context ends.

        Raises PolicyError (policy_stale) when it is too old to be used.
        """
        ...

    async def changed_from(self, revision: str) -> str:
        """The revision in force, as soon as it is another than ``revision``."""
        ...
