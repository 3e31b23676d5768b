"""The door of a tool server: nobody acts here without a permit."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any, Final, Protocol

from pdp.canonical import JsonObject, JsonValue
from pdp.permit import Permit, PermitError, PermitVerifier
from pdp.reason import ReasonCode

Function = Callable[..., Any]
"""What a tool does."""
_TAKE_A_PERMIT: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


class Redeemer(Protocol):
    """Whatever counts the uses of permits: a PermitRedeemer, or Sidecars."""

    def redeem(self, permit: Permit) -> None:
        """Spend one use. Raises PermitError."""
        ...


class PermitDoor:
    """Lets a call in once, if its permit is for exactly this call. Threads and tasks may
    share it.
    """

    def __init__(
        self,
        verifier: PermitVerifier,
        redeemer: Redeemer | None,
        *,
        only_tenant: str | None = None,
        only_bound: bool | AbstractSet[str] = False,
    ) -> None:
        """``only_tenant`` is for a server that serves one tenant. ``only_bound`` names the
        tools that take no permit for whatever arguments, True being all of them: what
        changes something, where the policy is not to be alone in saying so. ``redeemer`` None is for a
        server that can not reach the sidecar, and whose tools may run twice without harm:
        a permit then counts as often as it is shown, until it expires.
        """
        self._verifier = verifier
        self._redeemer = redeemer
        self._only_tenant = only_tenant
        self._only_bound = only_bound

    def admit(
        self, permit: str, *, tool: str, arguments: JsonObject, certificate_sha256: str = ""
    ) -> Permit:
        """The permit, verified and one use of it spent. Whose call it is stands in it, and
        nowhere else. ``certificate_sha256`` is of the client certificate that the transport
        has verified, as in Permit.certificate_sha256. Raises PermitError.
        """
        verified = self._verifier.verify(
            permit,
            tool=tool,
            arguments=arguments,
            tenant=self._only_tenant,
            certificate_sha256=certificate_sha256,
        )
        if not verified.arguments_sha256 and self._must_be_bound(tool):
            raise PermitError(
                ReasonCode.PERMIT_MISMATCH,
                "The tool takes no permit for whatever arguments: let the policy bind them.",
            )
        if self._redeemer is not None:
            self._redeemer.redeem(verified)
        return verified

    def _must_be_bound(self, tool: str) -> bool:
        only_bound = self._only_bound
        return only_bound if isinstance(only_bound, bool) else tool in only_bound

    async def admit_async(
        self, permit: str, *, tool: str, arguments: JsonObject, certificate_sha256: str = ""
    ) -> Permit:
        """As :meth:`admit`, without keeping the event loop waiting: keys may have to be
        fetched, and the sidecar to be asked.
        """
        return await asyncio.to_thread(
            self.admit,
            permit,
            tool=tool,
            arguments=arguments,
            certificate_sha256=certificate_sha256,
        )

    def tool(self, name: str) -> Callable[[Function], Function]:
        """Put the door before a tool's function.

        The function gets the verified permit first, and whoever calls it gives the permit's
        text in its place. All other arguments are by name, are JSON, and are those of the
        call::

            @door.tool("orders.update")
            def update(permit: Permit, *, order_id: str, status: str) -> Order: ...


            update(request.headers["tool-permit"], order_id="918", status="shipped")

        A coroutine function stays one. Raises PermitError; then the function does not run.
        Raises TypeError at once for a function that takes no permit, and for a generator.
        """
        if not name or type(name) is not str:
            raise TypeError('name the tool: @door.tool("orders.update")')

        def decorate(function: Function) -> Function:
            first = next(iter(inspect.signature(function).parameters.values()), None)
            if first is None or first.kind not in _TAKE_A_PERMIT:
                raise TypeError(f"{name} takes no permit: let that be its first parameter")
            if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError(f"{name} is a generator: put the door before what runs it")
            if asyncio.iscoroutinefunction(function):

                @functools.wraps(function)
                async def call_async(permit: str, /, **arguments: JsonValue) -> Any:  # noqa: ANN401
                    admitted = await self.admit_async(permit, tool=name, arguments=arguments)
                    return await function(admitted, **arguments)

                return call_async

            @functools.wraps(function)
            def call(permit: str, /, **arguments: JsonValue) -> Any:  # noqa: ANN401
                return function(self.admit(permit, tool=name, arguments=arguments), **arguments)

            return call

        return decorate
