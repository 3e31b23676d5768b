"""Ask an OPA server for the value of a rule: every odd answer is a denial.

Nothing of what OPA answers is ever quoted: its errors repeat what the policy was asked.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, TypeVar

import aiohttp
from opa_client import AsyncOpaClient  # type: ignore[import-untyped]

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.bundle import joint_revision
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.syntax import rule_paths
from pdp.reason import ReasonCode

MAX_ANSWER_BYTES: Final = 1024 * 1024
"""Largest answer that is read, as of the embedded engine."""
MAX_MODULES_BYTES: Final = 256 * 1024 * 1024
"""Largest list of modules: the syntax trees of the largest bundle."""
MAX_WAITING: Final = 1024
"""Questions that wait for their turn at most; one more is refused at once."""
MAX_WAIT_SECONDS: Final = 1.0
"""Longest wait for a turn, before the deadline of the evaluation itself begins."""
HEALTH_TIMEOUT_SECONDS: Final = 1.0
UNKNOWN_REVISION: Final = "unknown"
"""Stands for the revision of what OPA has not got from a bundle that names one."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a rule has for a value, and the revision of the bundles that it follows from."""

    defined: bool
    value: JsonValue
    revision: str

    def value_or_denial(self) -> JsonValue:
        """The value. Raises PolicyError (policy_undefined) when there is none."""
        if not self.defined:
            raise PolicyError(ReasonCode.POLICY_UNDEFINED, "The policy gives no answer.")
        return self.value


class OpaClient:
    """Asks one OPA server, over connections that are kept, a bounded number at a time.

    A question that is given up, at its deadline or because the caller has gone, takes
    its connection with it: OPA then ends the evaluation, and no later question can be
    answered by the reply.
    """

    def __init__(
        self,
        url: str,
        *,
        connect: Callable[[], aiohttp.BaseConnector],
        token: Callable[[], str | None] = lambda: None,
        deadline_ms: int,
        concurrency: int,
    ) -> None:
        self._client = _Client(url, connect=connect, token=token)
        self._deadline_seconds = deadline_ms / 1000
        self._turns = asyncio.Semaphore(concurrency)
        self._waiting = 0
        self._closed = False

    async def evaluate(
        self,
        entrypoint: Entrypoint,
        document: JsonObject,
        *,
        deadline_seconds: float | None = None,
    ) -> Reply:
        """The value of a rule for ``input = document``. Raises PolicyError, unless the
        rule is merely undefined.
        """
        await self._take_turn()
        try:
            async with asyncio.timeout(deadline_seconds or self._deadline_seconds):
                answer = await self._ask(entrypoint, document)
        except TimeoutError:
            raise PolicyError(
                ReasonCode.POLICY_TIMEOUT, "The policy ran past its deadline."
            ) from None
        finally:
            self._turns.release()
        return Reply(
            defined="result" in answer,
            value=answer.get("result"),
            revision=revision_of(answer.get("provenance")),
        )

    async def healthy(self) -> bool:
        """Whether OPA answers, and every bundle it is to load is active."""
        if self._closed:
            return False
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
                return await self._client.check_health(query={"bundles": True}) is True
        except TimeoutError:
            return False

    async def rules(self) -> frozenset[str]:
        """The rules that OPA has loaded, as the paths they are asked for by.

        Raises PolicyError (policy_unavailable).
        """

        async def ask() -> frozenset[str]:
            return frozenset(_rules(await self._client.modules()))

        return await self._guarded(ask)

    async def close(self) -> None:
        """Let go of the connections; later questions get policy_unavailable."""
        self._closed = True
        await self._client.close_connection()

    async def _take_turn(self) -> None:
        if self._closed or self._waiting >= MAX_WAITING:
            raise unavailable()
        self._waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise unavailable() from None
        finally:
            self._waiting -= 1

    async def _ask(self, entrypoint: Entrypoint, document: JsonObject) -> JsonObject:
        answer = await self._guarded(
            lambda: self._client.query_rule(
                input_data=document,
                package_path=entrypoint.value,
                query_params={"provenance": True},
            )
        )
        if not isinstance(answer, dict):
            raise unavailable()
        return answer

    async def _guarded(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """What ``ask`` answers. What it raises has no root in common but Exception."""
        if self._closed:
            raise unavailable()
        try:
            return await ask()
        except (PolicyError, TimeoutError):
            raise
        except Exception:  # noqa: BLE001 - whatever it is, it is a denial
            raise unavailable() from None


def unavailable() -> PolicyError:
    """OPA could not take the question, or nobody can tell what it answered."""
    return PolicyError(
        ReasonCode.POLICY_UNAVAILABLE, "The policy engine can not take the question now."
    )


def revision_of(provenance: JsonValue) -> str:
    """The revision of all bundles that OPA has."""
    if not isinstance(provenance, dict):
        return UNKNOWN_REVISION
    bundles = provenance.get("bundles")
    if not isinstance(bundles, dict) or not bundles:
        bundles = {"": provenance}  # of an OPA with one bundle, as it was configured of old
    return joint_revision({name: _revision_text(bundle) for name, bundle in bundles.items()})


def _revision_text(holder: JsonValue) -> str:
    revision = holder.get("revision") if isinstance(holder, dict) else None
    return revision if isinstance(revision, str) and revision else UNKNOWN_REVISION


class _Client(AsyncOpaClient):  # type: ignore[misc]  # the library has no types
    """AsyncOpaClient with what it has no setting for: any connector, a token that may
    change, no redirects, and a bound on what is read.
    """

    _session: aiohttp.ClientSession | None

    def __init__(
        self,
        url: str,
        *,
        connect: Callable[[], aiohttp.BaseConnector],
        token: Callable[[], str | None],
    ) -> None:
        super().__init__(retries=0)
        # It puts a URL together from host and port, which loses the brackets of IPv6.
        self.root_url = f"{url.rstrip('/')}/v1"
        self._health_url = f"{url.rstrip('/')}/health"
        self._connect = connect
        self._token = token

    async def check_health(
        self, query: dict[str, bool] | None = None, diagnostic_url: str | None = None
    ) -> bool:
        healthy: bool = await super().check_health(query, diagnostic_url or self._health_url)
        return healthy

    async def modules(self) -> JsonValue:
        """The modules that OPA has compiled, with their syntax trees."""
        async with self._request(
            "GET", f"{self.root_url}/policies", most=MAX_MODULES_BYTES
        ) as answer:
            answer.raise_for_status()
            listed: JsonValue = json.loads(answer.body)
            return listed

    async def _init_session(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=self._connect(),
            timeout=aiohttp.ClientTimeout(total=None),  # the caller's own deadline holds
            # OPA would spend longer on packing an answer than a socket on carrying it.
            headers={"Accept-Encoding": "identity"},
        )

    @asynccontextmanager
    async def _request(
        self, method: str, url: str, *, most: int = MAX_ANSWER_BYTES, **options: object
    ) -> AsyncIterator[_Answer]:
        if self._session is None:
            await self._init_session()
        token = self._token()
        if token is not None:
            options["headers"] = {"Authorization": f"Bearer {token}"}
        async with super()._request(method, url, allow_redirects=False, **options) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > most:
                    response.close()
                    raise _too_large(response.status)
        yield _Answer(response.status, bytes(body))


@dataclass(frozen=True, slots=True)
class _Answer:
    """As much of an aiohttp response as AsyncOpaClient asks for, read to its end."""

    status: int
    body: bytes

    def raise_for_status(self) -> None:
        """Raise PolicyError unless OPA has answered."""
        if self.status == HTTPStatus.OK:
            return
        if self.status in _OF_THE_POLICY and _has_code(json.loads(self.body)):
            raise _failed()
        raise unavailable()

    async def json(self) -> JsonValue:
        """The body. Raises PolicyError: what is no JSON is not of OPA's making, and
        what is JSON beyond any answer is of the policy's.
        """
        try:
            value: JsonValue = json.loads(
                self.body, parse_float=_finite, parse_constant=_refuse_constant
            )
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise unavailable() from None
        except (ValueError, RecursionError):
            raise _failed() from None
        return value


def _too_large(status: int) -> PolicyError:
    """Of the policy's making where OPA says that it has evaluated it."""
    return _failed() if status == HTTPStatus.OK else unavailable()


def _failed() -> PolicyError:
    return PolicyError(ReasonCode.POLICY_ERROR, "The policy failed while it ran.")


_OF_THE_POLICY: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.INTERNAL_SERVER_ERROR})


def _has_code(error: JsonValue) -> bool:
    """Whether OPA says that it could not read the question, evaluate the policy, or
    write its answer down. All three are of the policy's making, and the embedded
    engine answers them alike.
    """
    return isinstance(error, dict) and error.get("code") in ("invalid_parameter", "internal_error")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("beyond what a double holds")
    return number


def _refuse_constant(_name: str) -> JsonValue:
    raise unavailable()  # NaN and Infinity are not JSON


def _rules(listed: JsonValue) -> Iterator[str]:
    """The path of every rule in OPA's list of modules."""
    answer: Any = listed
    for module in answer["result"]:
        yield from map("/".join, rule_paths(module["ast"]))
