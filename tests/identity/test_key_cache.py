"""Keys of issuers: asked for in time and not too often, and not used for ever."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
from aiohttp import web

from pdp.identity import jwks_http, key_cache
from pdp.identity.jwks_http import JwksUrl
from pdp.identity.key_cache import COOLDOWN_SECONDS, MAX_WAITING, RETRY_SECONDS, KeyCache
from pdp.identity.key_source import KeySourceError
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.tenancy import TenantRule
from pdp.identity.tokens import Issuer, TokenIdentity
from pdp.testing import TokenIssuer
from tests.identity.identity_provider import IdentityProvider, down, until
from tests.policy.sources.servers import web_server

T = TypeVar("T")
OLD, NEW = TokenIssuer(kid="old"), TokenIssuer(kid="new")


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def idp() -> IdentityProvider:
    idp = IdentityProvider()
    idp.publish(OLD)
    return idp


@pytest.fixture
def address(idp: IdentityProvider) -> Iterator[str]:
    with web_server(idp.handle) as address:
        yield address


@pytest.fixture
def cache(address: str, clock: Clock) -> KeyCache:
    return KeyCache(
        JwksUrl(f"http://{address}/jwks.json?key=query-secret", ca_file=None),
        poll_seconds=300,
        max_age_seconds=3_600,
        clock=clock,
    )


def with_cache(cache: KeyCache, work: Callable[[], Awaitable[T]]) -> T:
    async def run() -> T:
        try:
            return await work()
        finally:
            await cache.close()

    return asyncio.run(run())


async def finds(cache: KeyCache, kid: str) -> bool | None:
    """Whether there is such a key; None where that can not be told."""
    try:
        return await cache.find(kid) is not None
    except KeySourceError:
        return None


def test_a_hundred_calls_make_one_request(cache: KeyCache, idp: IdentityProvider) -> None:
    async def work() -> None:
        found = await asyncio.gather(*(cache.find("old") for _ in range(100)))
        assert all(found)
        assert await finds(cache, "old")
        assert idp.asked == {"/jwks.json": 1}

    with_cache(cache, work)


def test_a_call_that_is_given_up_does_not_end_the_fetch_for_others(
    cache: KeyCache, idp: IdentityProvider
) -> None:
    let_go = asyncio.Event()
    loop: list[asyncio.AbstractEventLoop] = []
    usual = idp.handle

    async def slow(request: web.Request) -> web.StreamResponse:
        loop.append(asyncio.get_running_loop())
        await let_go.wait()
        idp.behaviour = None
        return await usual(request)

    idp.behaviour = slow

    async def work() -> None:
        first = asyncio.create_task(cache.find("old"))
        second = asyncio.create_task(cache.find("old"))
        await until(lambda: bool(loop))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        loop[0].call_soon_threadsafe(let_go.set)
        assert await second is not None

    with_cache(cache, work)


def test_while_a_place_hangs_no_more_than_so_many_calls_wait_for_it(
    cache: KeyCache, idp: IdentityProvider
) -> None:
    asked, let_go = threading.Event(), threading.Event()
    usual = idp.handle

    async def hang(request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.to_thread(let_go.wait)
        idp.behaviour = None
        return await usual(request)

    idp.behaviour = hang

    async def work() -> None:
        strangers = [
            asyncio.create_task(finds(cache, f"made-up-{number}")) for number in range(MAX_WAITING)
        ]
        await asyncio.to_thread(asked.wait)
        # Answered at once, while all of those still wait.
        assert await finds(cache, "one-more") is None
        assert not any(task.done() for task in strangers)
        let_go.set()
        assert await asyncio.gather(*strangers) == [False] * MAX_WAITING
        assert await finds(cache, "old")

    try:
        with_cache(cache, work)
    finally:
        let_go.set()


def test_a_hundred_thousand_made_up_keys_make_one_request_each_cooldown(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def work() -> None:
        assert await finds(cache, "old")
        for round_ in range(3):
            for number in range(33_334):
                assert await cache.find(f"made-up-{round_}-{number}") is None
            assert await finds(cache, "old")
            assert idp.asked["/jwks.json"] == 1 + round_
            clock.now += COOLDOWN_SECONDS
        assert len(cache._keys) == 1

    began = time.process_time()
    with_cache(cache, work)
    assert time.process_time() - began < 5


def test_strangers_do_not_keep_a_new_key_from_being_seen(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def work() -> None:
        assert await finds(cache, "made-up") is False
        idp.publish(OLD, NEW)
        assert await finds(cache, "new") is False
        clock.now += COOLDOWN_SECONDS
        assert await finds(cache, "new")
        assert await finds(cache, "old")

    with_cache(cache, work)


def test_keys_outlast_an_outage_and_not_a_long_one(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def work() -> None:
        assert await finds(cache, "old")
        idp.behaviour = down
        clock.now += 3_600
        await cache.look()
        assert await finds(cache, "old")
        # Of a key that is not here it can not be told.
        assert await finds(cache, "new") is None
        clock.now += 1
        assert await finds(cache, "old") is None
        assert not cache.usable
        assert "check the server (status 503)" in str(cache.error)
        idp.behaviour = None
        clock.now += RETRY_SECONDS
        assert await finds(cache, "old")
        assert cache.age_seconds == 0

    with_cache(cache, work)


def test_a_source_that_is_down_from_the_start_is_asked_again(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    idp.behaviour = down

    async def work() -> None:
        for _ in range(50):
            assert await finds(cache, "old") is None
        assert idp.asked["/jwks.json"] == 1
        assert cache.age_seconds == float("inf")
        idp.behaviour = None
        clock.now += RETRY_SECONDS
        assert await finds(cache, "old")

    with_cache(cache, work)


def test_a_server_that_asks_for_a_pause_gets_it(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def busy(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "120"})

    idp.behaviour = busy

    async def work() -> None:
        assert await finds(cache, "old") is None
        idp.behaviour = None
        clock.now += 119
        assert await finds(cache, "old") is None
        clock.now += 14
        assert await finds(cache, "old")
        assert idp.asked["/jwks.json"] == 2

    with_cache(cache, work)


def test_a_call_does_not_wait_long_for_a_slow_source(
    cache: KeyCache, idp: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_cache, "WAIT_SECONDS", 0.1)
    usual = idp.handle

    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.4)
        idp.behaviour = None
        return await usual(request)

    idp.behaviour = slow

    async def work() -> None:
        assert await asyncio.gather(*(finds(cache, "old") for _ in range(10))) == [None] * 10
        await cache.look()
        assert await finds(cache, "old")

    with_cache(cache, work)


def test_a_source_that_hangs_is_given_up(
    cache: KeyCache, idp: IdentityProvider, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    async def hanging(_request: web.Request) -> web.StreamResponse:
        await until(over.is_set)
        return web.Response()

    async def work() -> None:
        assert await finds(cache, "old")
        monkeypatch.setattr(jwks_http, "REQUEST_SECONDS", 0.1)
        idp.behaviour = hanging
        clock.now += 300
        began = time.monotonic()
        await cache.look()
        assert time.monotonic() - began < 5
        over.set()
        assert "did not come within 0.1 seconds" in (cache.error or "")
        assert await finds(cache, "old")

    with_cache(cache, work)


def test_a_key_that_was_taken_away_counts_no_more_once_that_is_seen(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def work() -> None:
        assert await finds(cache, "old")
        idp.publish(NEW)
        clock.now += 300
        await cache.look()
        assert await finds(cache, "old") is False
        assert await finds(cache, "new")

    with_cache(cache, work)


def test_an_issuer_that_publishes_no_key_has_taken_all_away(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def work() -> None:
        assert await finds(cache, "old")
        idp.publish()
        clock.now += 300
        await cache.look()
        assert await finds(cache, "old") is False
        assert not cache.usable

    with_cache(cache, work)


def test_it_is_asked_in_time_even_when_nobody_calls(address: str, idp: IdentityProvider) -> None:
    results: list[str] = []
    cache = KeyCache(
        JwksUrl(f"http://{address}/jwks.json", ca_file=None),
        poll_seconds=0.02,
        max_age_seconds=60,
        fetched=results.append,
    )

    async def work() -> None:
        looking = asyncio.create_task(cache.keep_fresh())
        try:
            await until(lambda: results.count("ok") >= 3)
            idp.behaviour = down
            await until(lambda: results.count("failed") >= 2)
            idp.behaviour = None
            idp.publish(NEW)
            await until(lambda: "new" in cache._keys)
        finally:
            looking.cancel()

    with_cache(cache, work)


def test_looks_are_spread_and_failures_are_retried_sooner(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    async def work() -> None:
        await cache.look()
        rests = set()
        for _ in range(20):
            await cache.look()
            rests.add(cache._poll_at - clock.now)
        assert len(rests) > 1
        assert all(270 <= rest <= 330 for rest in rests)
        idp.behaviour = down
        for _ in range(10):
            await cache.look()
            assert cache._poll_at - clock.now <= RETRY_SECONDS

    with_cache(cache, work)


def test_a_fault_is_told_once_and_without_what_is_secret(
    cache: KeyCache, idp: IdentityProvider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    idp.behaviour = down

    async def work() -> None:
        for _ in range(3):
            await cache.look()
        idp.behaviour = None
        await cache.look()

    with_cache(cache, work)
    fault, recovery = (
        record.getMessage() for record in caplog.records if record.name.startswith("pdp.")
    )
    assert fault.startswith("The key set http://127.0.0.1:")
    assert fault.endswith("/jwks.json can not be had now: check the server (status 503).")
    assert recovery.endswith("/jwks.json is there again")


def test_a_fetcher_that_fails_in_its_own_way_is_a_source_that_is_down(clock: Clock) -> None:
    class Broken:
        place = "nowhere"

        async def fetch(self) -> dict[str, object]:
            raise RuntimeError("secret detail")

        async def close(self) -> None:
            pass

    cache = KeyCache(
        Broken(),  # type: ignore[arg-type]
        poll_seconds=300,
        max_age_seconds=3_600,
        clock=clock,
    )

    async def work() -> None:
        assert await finds(cache, "old") is None

    with_cache(cache, work)
    assert cache.error == "The key set nowhere failed: RuntimeError."


def identity_of(cache: KeyCache) -> TokenIdentity:
    return TokenIdentity(
        [
            Issuer(
                issuer=OLD.issuer,
                audiences=frozenset({OLD.audience}),
                types=frozenset({"jwt"}),
                algorithms=frozenset({"EdDSA"}),
                keys=cache,
                tenant=TenantRule(claim="tenant_id"),
            )
        ]
    )


async def outcome(identity: TokenIdentity, token: str) -> str:
    try:
        await identity.resolve(Credentials(bearer=token))
    except IdentityError as error:
        return error.reason_code
    return "ok"


def test_a_remembered_token_falls_with_its_key(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    identity = identity_of(cache)
    token = OLD.token("tenant_acme", "user-7")

    async def work() -> None:
        assert await outcome(identity, token) == "ok"
        # Another key by the name of the one that signed.
        idp.publish(TokenIssuer(kid="old"), NEW)
        clock.now += 300
        await cache.look()
        assert await outcome(identity, token) == "token_invalid"
        assert await outcome(identity, NEW.token("tenant_acme", "user-7")) == "ok"
        idp.publish(OLD)
        clock.now += 300
        await cache.look()
        assert await outcome(identity, token) == "ok"

    with_cache(cache, work)


def test_a_remembered_token_falls_when_the_keys_are_too_old(
    cache: KeyCache, idp: IdentityProvider, clock: Clock
) -> None:
    identity = identity_of(cache)
    token = OLD.token("tenant_acme", "user-7")

    async def work() -> None:
        assert await outcome(identity, token) == "ok"
        idp.behaviour = down
        clock.now += 3_601
        assert await outcome(identity, token) == "keys_unavailable"
        idp.behaviour = None
        clock.now += RETRY_SECONDS
        assert await outcome(identity, token) == "ok"

    with_cache(cache, work)


def test_keys_rotate_under_load_and_no_good_token_is_refused(
    address: str, idp: IdentityProvider
) -> None:
    cache = KeyCache(
        JwksUrl(f"http://{address}/jwks.json", ca_file=None),
        poll_seconds=0.01,
        max_age_seconds=60,
    )
    identity = identity_of(cache)
    signing = [TokenIssuer(kid="key-0")]
    idp.publish(signing[0])
    outcomes: list[str] = []
    made_up: list[str] = []
    over = False

    async def call() -> None:
        while not over:
            outcomes.append(await outcome(identity, signing[-1].token("tenant_acme", "user-7")))
            await asyncio.sleep(0)

    async def attack() -> None:
        stranger = TokenIssuer(kid="made-up")
        while not over:
            made_up.append(await outcome(identity, stranger.token("tenant_acme", "user-7")))
            await asyncio.sleep(0)

    async def work() -> None:
        nonlocal over
        looking = asyncio.create_task(cache.keep_fresh())
        calls = [asyncio.create_task(call()) for _ in range(8)]
        calls.append(asyncio.create_task(attack()))
        for number in range(1, 6):
            # Published before it signs, and taken away once it has not signed for a while.
            following = TokenIssuer(kid=f"key-{number}")
            idp.publish(signing[-1], following)
            await until(lambda name=following.kid: name in cache._keys)  # type: ignore[misc]
            signing.append(following)
            calls_before = len(outcomes)
            await until(lambda before=calls_before: len(outcomes) > before + 50)  # type: ignore[misc]
            idp.publish(following)
        over = True
        await asyncio.gather(*calls)
        looking.cancel()

    with_cache(cache, work)
    assert len(outcomes) > 250
    assert set(outcomes) == {"ok"}
    # While a fetch is under way it can not be told whether there is such a key.
    assert set(made_up) <= {"token_invalid", "keys_unavailable"}


@pytest.mark.parametrize("drawn", (0.0, 0.5, 1.0))
def test_sidecars_that_start_together_do_not_ask_together(clock: Clock, drawn: float) -> None:
    cache = KeyCache(
        JwksUrl("http://127.0.0.1:1/jwks.json", ca_file=None),
        poll_seconds=300,
        max_age_seconds=3_600,
        keys={},
        clock=clock,
        draw=lambda: drawn,
    )
    assert cache._poll_at - clock.now == drawn * 300
