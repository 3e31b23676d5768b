"""What the ledger in Redis promises beyond the port."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from pdp.budget.ledger import (
    Account,
    IdempotencyKey,
    LedgerError,
    Receipt,
    Scope,
    Window,
)
from pdp.budget.redis_ledger import RedisLedger
from pdp.config import RedisSettings, Sentinel, SharedDurability
from pdp.redis_store import open_redis, organisation_key, tenant_key
from pdp.storage import StorageError
from tests.budget.lossy_proxy import LossyProxy
from tests.budget.redis_server import RedisServer
from tests.budget.stores import RedisStoreOfTests
from tests.budget.teller import ALICE, NOON, SAME, Teller, calls, limit, rate
from tests.server.test_lifecycle import certify

T = TypeVar("T")

HUGE = limit(10**9, name="huge")


def settings_for(server: RedisServer, **changes: Any) -> RedisSettings:
    return RedisSettings(**{"unix": server.socket, "timeout_ms": 10_000, **changes})


@asynccontextmanager
async def ledger_on(settings: RedisSettings) -> AsyncIterator[RedisLedger]:
    """By the server's clock, as in production."""
    ledger = RedisLedger(await open_redis(settings))
    try:
        yield ledger
    finally:
        await ledger.close()


def key(operation: str, name: str, note: str = "") -> IdempotencyKey:
    return IdempotencyKey(operation=operation, key=name, content_sha256=SAME, note=note)


async def charge(ledger: RedisLedger, name: str, amount: int = 1) -> Receipt:
    return await ledger.charge(
        ALICE, key("charge", name, note=name), charges=[calls(amount)], limits=[HUGE]
    )


async def spent(ledger: RedisLedger) -> int:
    (state,) = await ledger.state(ALICE, limits=[HUGE])
    return state.spent


@pytest.fixture
def teller(redis_server: RedisServer) -> Iterator[Teller]:
    teller = Teller(RedisStoreOfTests(redis_server))
    yield teller
    teller.close()


# Whose reply it is


def test_callers_that_go_away_at_random_leave_no_reply_to_others(
    redis_server: RedisServer,
) -> None:
    chance = random.Random(6)  # noqa: S311 - not for secrets

    async def one(ledger: RedisLedger, number: int) -> bool:
        name = f"call-{number}"
        task = asyncio.ensure_future(charge(ledger, name))
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.02)
            task.cancel()
        try:
            receipt = await task
        except asyncio.CancelledError:
            return False
        assert receipt.note == name
        return True

    async def scene() -> None:
        async with ledger_on(settings_for(redis_server, connections=4)) as ledger:
            answered = await asyncio.gather(*(one(ledger, number) for number in range(1000)))
            assert {True, False} == set(answered)
            # What was begun is done, whoever has gone.
            assert await spent(ledger) == 1000
            for number in range(0, 1000, 50):
                again = await charge(ledger, f"call-{number}")
                assert (again.note, again.replayed) == (f"call-{number}", True)

    asyncio.run(scene())


def test_a_connection_that_was_late_is_dropped_and_its_reply_with_it(
    redis_server: RedisServer,
) -> None:
    async def scene() -> None:
        settings = settings_for(redis_server, timeout_ms=100, connections=2)
        async with ledger_on(settings) as ledger:
            await charge(ledger, "before")
            redis_server.signal(signal.SIGSTOP)
            try:
                for name in ("late-1", "late-2"):
                    with pytest.raises(LedgerError) as caught:
                        await charge(ledger, name)
                    assert caught.value.reason_code == "budget_unavailable"
            finally:
                redis_server.signal(signal.SIGCONT)
            redis_server.wait_until_ready()
            for name in ("next", "late-1", "late-2", "before"):
                assert (await charge(ledger, name)).note == name
            assert await spent(ledger) == 4

    asyncio.run(scene())


def test_an_answer_whose_reply_was_lost_is_given_whole_and_as_the_first(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async def scene() -> None:
        async with LossyProxy(redis_server.socket, tmp_path / "proxy.sock") as proxy:
            settings = RedisSettings(unix=proxy.socket, timeout_ms=10_000)
            async with ledger_on(settings) as ledger:
                await charge(ledger, "before")
                proxy.lose_next_reply()
                receipt = await charge(ledger, "lost", 3)
                assert proxy.lost == 1
                assert not receipt.replayed
                assert [each.spent for each in receipt.limits] == [4]
                assert (await charge(ledger, "lost", 3)).replayed
                assert await spent(ledger) == 4

    asyncio.run(scene())


def test_a_reply_that_is_another_calls_is_never_taken(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async def scene() -> None:
        async with LossyProxy(redis_server.socket, tmp_path / "proxy.sock") as proxy:
            settings = RedisSettings(unix=proxy.socket, timeout_ms=10_000, connections=1)
            async with ledger_on(settings) as ledger:
                await charge(ledger, "first")
                proxy.repeat_last_reply()
                with pytest.raises(LedgerError) as caught:
                    await charge(ledger, "second")
                assert caught.value.reason_code == "budget_unavailable"
                assert (await charge(ledger, "third")).note == "third"

    asyncio.run(scene())


def test_scripts_that_the_server_has_forgotten_are_sent_again(redis_server: RedisServer) -> None:
    async def scene() -> None:
        async with ledger_on(settings_for(redis_server)) as ledger:
            for name in ("one", "two", "three"):
                await charge(ledger, name)
                redis_server.command("SCRIPT", "FLUSH")
            assert await spent(ledger) == 3

    asyncio.run(scene())


def test_more_operations_than_can_wait_are_refused_at_once(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdp.redis_store.MAX_WAITING", 3)

    async def scene() -> None:
        async with ledger_on(settings_for(redis_server)) as ledger:
            answers = await asyncio.gather(
                *(charge(ledger, f"call-{number}") for number in range(5)), return_exceptions=True
            )
            refused = [answer for answer in answers if isinstance(answer, LedgerError)]
            assert {each.reason_code for each in refused} == {"budget_unavailable"}
            assert len(refused) == 2
            assert await spent(ledger) == 3

    asyncio.run(scene())


# Many sidecars


def reserve_many(socket: str, worker: int, results: multiprocessing.Queue[int]) -> None:
    async def scene() -> int:
        settings = RedisSettings(unix=Path(socket), timeout_ms=30_000)
        async with ledger_on(settings) as ledger:
            receipts = await asyncio.gather(
                *(
                    ledger.reserve(
                        Account(tenant="acme", actor=f"actor-{number % 7}"),
                        key("reserve", f"{worker}-{number}"),
                        charges=[calls(1)],
                        limits=[limit(50, window=Window.LIFETIME, scope=Scope.TENANT)],
                        ttl_seconds=600,
                    )
                    for number in range(125)
                )
            )
        return sum(receipt.refused_by is None for receipt in receipts)

    results.put(asyncio.run(scene()))


def test_a_thousand_reserves_at_eight_sidecars_against_a_limit_for_fifty_admit_fifty(
    redis_server: RedisServer,
) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    workers = [
        context.Process(target=reserve_many, args=(str(redis_server.socket), number, results))
        for number in range(8)
    ]
    for worker in workers:
        worker.start()
    admitted = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert sum(admitted) == 50


def test_what_is_held_at_one_sidecar_is_settled_at_another(redis_server: RedisServer) -> None:
    async def scene() -> None:
        settings = settings_for(redis_server)
        async with ledger_on(settings) as here, ledger_on(settings) as there:
            hold = await here.reserve(
                ALICE, key("reserve", "k"), charges=[calls(4)], limits=[HUGE], ttl_seconds=60
            )
            receipt = await there.settle(ALICE, key("settle", "k"), hold_id=hold.id, charges=None)
            assert receipt.charges == (calls(4),)
            assert await spent(here) == 4
            again = await here.settle(ALICE, key("settle", "k"), hold_id=hold.id, charges=None)
            assert (again.replayed, again.charges) == (True, (calls(4),))

    asyncio.run(scene())


def test_sidecars_on_one_store_know_it_by_one_name(redis_server: RedisServer) -> None:
    async def scene() -> list[str]:
        stores = await asyncio.gather(*(open_redis(settings_for(redis_server)) for _ in range(8)))
        for store in stores:
            await store.close()
        return [store.id for store in stores]

    names = set(asyncio.run(scene()))
    assert len(names) == 1
    assert len(names.pop()) == 32


# Time


def test_the_servers_clock_decides_whatever_the_callers_says(redis_server: RedisServer) -> None:
    async def scene() -> None:
        async with ledger_on(settings_for(redis_server)) as ledger:
            minute = limit(10, window=Window.MINUTE)
            for ahead in (-400 * 86_400.0, 0.0, 400 * 86_400.0):
                ledger._ahead = ahead
                hold = await ledger.reserve(
                    ALICE,
                    key("reserve", f"k{ahead}"),
                    charges=[calls(1)],
                    limits=[minute],
                    ttl_seconds=60,
                )
                assert abs(hold.expires_at - time.time() - 60) < 5
                assert abs(ledger._ahead) < 5

    asyncio.run(scene())


def test_thousands_of_holds_that_expired_are_let_go_in_one_step(
    teller: Teller, redis_server: RedisServer
) -> None:
    many = limit(10**6, window=Window.LIFETIME)

    async def burst() -> None:
        await asyncio.gather(
            *(
                teller.ledger.reserve(
                    ALICE,
                    key("reserve", f"k-{seconds}"),
                    charges=[calls(2)],
                    limits=[many],
                    ttl_seconds=seconds,
                )
                for seconds in range(1, 3601, 2)
            )
        )

    teller.do(burst())
    assert teller.counts(many) == [(0, 3600)]
    teller.now = NOON + 1800
    assert teller.counts(many) == [(0, 1800)]
    teller.now = NOON + 4000
    assert teller.counts(many) == [(0, 0)]
    assert teller.charge(calls(10**6), limits=[many]).id
    (name,) = redis_server.keys("pdp:{t:acme}:sum:*")
    assert held_fields(redis_server, name) == []
    assert redis_server.keys("pdp:{t:acme}:expiry:*") == []


def held_fields(server: RedisServer, account: str) -> list[str]:
    """The fields under which an account counts what expires in a second."""
    fields = server.command("HKEYS", account).decode().split("\r\n")
    return [field for field in fields if field.removesuffix("c").isdecimal()]


# Nothing grows without bound, nothing meets


def test_everything_is_forgotten_in_the_end_but_lifetime_sums(
    teller: Teller, redis_server: RedisServer
) -> None:
    at_once = limit(100, name="at-once", window=Window.CONCURRENT)
    org = limit(100, name="org", scope=Scope.ORGANISATION)
    ever = limit(100, name="ever", window=Window.LIFETIME)
    limits = [limit(100), ever, at_once, org, rate(100)]
    alice = replace(ALICE, organisation="acme")
    hold = teller.reserve(calls(2), limits=limits, account=alice)
    teller.reserve(calls(2), limits=limits, account=alice)
    teller.charge(calls(2), limits=limits, account=alice)
    teller.settle(hold.id)
    names = redis_server.keys("*")
    kinds = {name: name.split(":")[3] for name in names if name != "pdp:ledger"}
    assert set(kinds.values()) == {
        *("clock", "answer", "hold", "sum", "expiry", "accounts", "holds")
    }
    for name, kind in kinds.items():
        ttl = int(redis_server.command("TTL", name)[1:])
        lifetime = ":lifetime:" in name
        assert (ttl == -1) if lifetime else (ttl > 0), name
        if kind in {"answer", "hold"}:
            assert ttl == 86_400 + 3600 + 1


def test_a_hold_that_is_ended_leaves_nothing_on_its_account(
    teller: Teller, redis_server: RedisServer
) -> None:
    holds = [teller.reserve(calls(2)) for _ in range(3)]
    teller.settle(holds[0].id)
    teller.release(holds[1].id)
    (name,) = redis_server.keys("pdp:{t:acme}:sum:*")
    assert held_fields(redis_server, name) == [str(NOON + 60)]
    teller.settle(holds[2].id)
    assert held_fields(redis_server, name) == []
    assert redis_server.keys("pdp:{t:acme}:expiry:*") == []


@pytest.mark.parametrize("tenant", ("a}b", "{a", "a:b", "a%7D", "}{", "ä"))
def test_no_name_leaves_its_tenants_slot_or_passes_for_another(tenant: str) -> None:
    made = tenant_key(tenant, "hold", "x:y}")
    assert made[made.index("{") + 1 : made.index("}")].startswith("t:")
    assert made.count("{") == made.count("}") == 1
    assert made.split(":")[3:] == ["hold", "x%3Ay%7D"]
    assert organisation_key(tenant, "hold", "x:y}") == made.replace("{t:", "{o:")


def test_names_of_tenants_and_accounts_do_not_meet(teller: Teller) -> None:
    pairs = (("a:b", "c"), ("a", "b:c"), ("a%3Ab", "c"))
    for actor, name in pairs:
        account = Account(tenant="acme", actor=actor)
        by_actor = limit(1, name=name, scope=Scope.ACTOR)
        assert teller.charge(calls(1), limits=[by_actor], account=account).id


# Before it starts


def refusal(settings: RedisSettings) -> str:
    async def scene() -> None:
        await (await open_redis(settings)).close()

    with pytest.raises(StorageError) as caught:
        asyncio.run(scene())
    return str(caught.value)


def is_taken(settings: RedisSettings) -> bool:
    async def scene() -> None:
        await (await open_redis(settings)).close()

    asyncio.run(scene())
    return True


@pytest.mark.parametrize(
    ("option", "said"),
    (
        ("appendonly no", "set appendonly yes"),
        ("maxmemory-policy allkeys-lru", "set maxmemory-policy noeviction"),
    ),
)
def test_a_server_that_forgets_is_refused_unless_told_otherwise(
    redis_server: RedisServer, option: str, said: str
) -> None:
    name, value = option.split()
    before = {"appendonly": "yes", "maxmemory-policy": "noeviction"}[name]
    redis_server.command("CONFIG", "SET", name, value)
    try:
        assert said in refusal(settings_for(redis_server))
        assert is_taken(settings_for(redis_server, allow_volatile=True))
    finally:
        redis_server.command("CONFIG", "SET", name, before)


def test_a_server_that_is_too_old_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "old.sock"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.read(4096):
            if b"HELLO" in request:
                writer.write(b"*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n")
                writer.write(b"$7\r\nversion\r\n$6\r\n6.2.14\r\n")
            else:
                writer.write(b"+OK\r\n" * request.count(b"*"))
        writer.close()
        await writer.wait_closed()
        done.set()

    async def scene() -> None:
        async with await asyncio.start_unix_server(answer, place):
            with pytest.raises(StorageError, match=r"version 6\.2\.14: 7\.0 or later"):
                await open_redis(RedisSettings(unix=place))
            await done.wait()

    done = asyncio.Event()
    asyncio.run(scene())


ACL = (
    "user pdp on >s3cret ~pdp:* -@all +hello +eval +evalsha +time +get +set +del +expire"
    " +hset +hget +hmget +hdel +zadd +zcount +zscore +zrangebyscore +zrem +zremrangebyscore"
    " +zremrangebyrank +scan +wait +client|setname +config|get"
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, text in (("user", "pdp\n"), ("password", "s3cret\n"), ("wrong", "wr0ng\n")):
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in ("user", "password", "wrong")}


def test_the_permissions_that_the_page_names_are_enough(
    redis_server: RedisServer, files: dict[str, Path]
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "operators.md"
    assert ACL.replace("s3cret", "PASSWORD") in page.read_text()
    redis_server.command("ACL", "SETUSER", *ACL.split()[1:])
    settings = settings_for(
        redis_server, username_file=files["user"], password_file=files["password"]
    )

    async def scene() -> None:
        async with ledger_on(settings) as ledger:
            hold = await ledger.reserve(
                ALICE, key("reserve", "k"), charges=[calls(4)], limits=[HUGE], ttl_seconds=60
            )
            await ledger.settle(ALICE, key("settle", "k"), hold_id=hold.id, charges=None)
            await ledger.refund(ALICE, key("refund", "k"), hold_id=hold.id, charges=[calls(1)])
            (listed,) = await ledger.accounts("acme", most=10)
            await ledger.grant(ALICE, key("grant", "k"), account_id=listed.id, amount=1)
            assert await spent(ledger) == 3
            assert await ledger.holds("acme", most=10) == ()
            assert await ledger.tenants(most=10) == ("acme",)

    try:
        asyncio.run(scene())
        redis_server.command("ACL", "SETUSER", "pdp", "-config|get")
        assert "+config|get" in refusal(settings)
        assert is_taken(msgspec.structs.replace(settings, unchecked=True))
    finally:
        redis_server.command("ACL", "DELUSER", "pdp")


def test_what_goes_wrong_shows_no_secret_and_no_name(
    redis_server: RedisServer, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.command("ACL", "SETUSER", *ACL.split()[1:])
    try:
        said = refusal(
            settings_for(redis_server, username_file=files["user"], password_file=files["wrong"])
        )
    finally:
        redis_server.command("ACL", "DELUSER", "pdp")
    for text in (said, caplog.text):
        assert not {"wr0ng", "s3cret", str(redis_server.socket)} & {
            word.strip("'\",.()") for word in text.split()
        }
        assert "wr0ng" not in text


def test_a_server_that_is_not_there_is_named_as_such(tmp_path: Path) -> None:
    settings = RedisSettings(unix=tmp_path / "none.sock", timeout_ms=500)
    assert "does not answer (budget.store)" in refusal(settings)


# What is lost, and what is not


def test_a_server_without_memory_refuses_whole_operations(
    redis_server: RedisServer,
) -> None:
    async def scene() -> None:
        async with ledger_on(settings_for(redis_server)) as ledger:
            hold = await ledger.reserve(
                ALICE, key("reserve", "k"), charges=[calls(4)], limits=[HUGE], ttl_seconds=60
            )
            redis_server.command("CONFIG", "SET", "maxmemory", "1")
            try:
                await unavailable(ledger, "call")
                with pytest.raises(LedgerError):
                    await ledger.settle(ALICE, key("settle", "k"), hold_id=hold.id, charges=None)
            finally:
                redis_server.command("CONFIG", "SET", "maxmemory", "0")
            (state,) = await ledger.state(ALICE, limits=[HUGE])
            assert (state.spent, state.held) == (0, 4)
            settled = await ledger.settle(ALICE, key("settle", "k"), hold_id=hold.id, charges=None)
            assert not settled.replayed

    asyncio.run(scene())


@pytest.mark.slow
def test_what_was_acknowledged_survives_the_death_of_the_server(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis", "appendfsync always").start()
    acknowledged: list[str] = []

    async def scene() -> None:
        settings = settings_for(server, timeout_ms=2000)
        async with ledger_on(settings) as ledger:
            for _ in range(3):
                names = [f"call-{len(acknowledged)}-{number}" for number in range(200)]
                burst = [asyncio.ensure_future(charge(ledger, name)) for name in names]
                for answered in itertools.islice(asyncio.as_completed(burst), 20):
                    await answered
                server.kill()
                answers = await asyncio.gather(*burst, return_exceptions=True)
                server.start()
                acknowledged.extend(
                    name
                    for name, answer in zip(names, answers, strict=True)
                    if isinstance(answer, Receipt)
                )
                for name in names:
                    answer = await charge(ledger, name)
                    assert answer.note == name
                    if name in acknowledged:
                        assert answer.replayed
            assert await spent(ledger) == 600
            assert 60 <= len(acknowledged) < 600

    try:
        asyncio.run(scene())
    finally:
        server.stop()


def test_litellm_30684_a_store_that_lost_everything_is_not_taken_for_the_one_it_was(
    tmp_path: Path,
) -> None:
    server = RedisServer(tmp_path / "redis").start()

    async def scene() -> None:
        async with ledger_on(settings_for(server)) as ledger:
            await charge(ledger, "before")
            server.command("FLUSHALL")
            server.kill()
            server.start()
            with pytest.raises(LedgerError) as caught:
                await charge(ledger, "after")
            assert caught.value.reason_code == "budget_unavailable"

    try:
        asyncio.run(scene())
    finally:
        server.stop()


def test_a_store_that_is_emptied_under_way_is_seen_at_once(redis_server: RedisServer) -> None:
    """Without any connection being made anew; in a cluster too."""

    async def scene() -> None:
        async with ledger_on(settings_for(redis_server)) as ledger:
            hold = await ledger.reserve(
                ALICE, key("reserve", "k"), charges=[calls(4)], limits=[HUGE], ttl_seconds=60
            )
            redis_server.command("FLUSHALL")
            await unavailable(ledger, "call")
            with pytest.raises(LedgerError) as caught:
                await ledger.settle(ALICE, key("settle", "k"), hold_id=hold.id, charges=None)
            assert caught.value.reason_code == "budget_unavailable"
            with pytest.raises(LedgerError) as caught:
                await ledger.state(ALICE, limits=[HUGE])
            assert caught.value.reason_code == "budget_unavailable"
        async with ledger_on(settings_for(redis_server)) as restarted:
            assert await spent(restarted) == 0

    asyncio.run(scene())


def test_strict_durability_waits_for_a_replica_and_denies_without(tmp_path: Path) -> None:
    port = free_port()
    primary = RedisServer(tmp_path / "primary", f"port {port}", "repl-diskless-sync-delay 0")
    replica = RedisServer(tmp_path / "replica", f"replicaof 127.0.0.1 {port}")
    primary.start()

    async def scene() -> None:
        settings = settings_for(primary, durability=SharedDurability.STRICT, timeout_ms=1000)
        async with ledger_on(settings) as ledger:
            await unavailable(ledger, "call")
            replica.start()
            await replica_is_up(replica)
            # It was done, and is acknowledged only now that a replica has it.
            assert (await in_the_end(partial(charge, ledger, "call"))).replayed
            await in_the_end(partial(charge, ledger, "another"))
            assert b"1" in replica.command("EXISTS", "pdp:{t:acme}:answer:alice:charge:another")
            replica.signal(signal.SIGSTOP)
            try:
                await unavailable(ledger, "a third")
                # Its first answer is not given again before that either.
                await unavailable(ledger, "another")
            finally:
                replica.signal(signal.SIGCONT)
            assert (await in_the_end(partial(charge, ledger, "a third"))).replayed
            assert await in_the_end(partial(spent, ledger)) == 3

    try:
        asyncio.run(scene())
    finally:
        primary.stop()
        replica.stop()


async def unavailable(ledger: RedisLedger, name: str) -> None:
    with pytest.raises(LedgerError) as caught:
        await charge(ledger, name)
    assert caught.value.reason_code == "budget_unavailable"


async def in_the_end(call: Callable[[], Awaitable[T]]) -> T:
    """What a caller gets who tries again for as long as the store is away."""
    for _ in range(200):
        with contextlib.suppress(LedgerError):
            return await call()
        await asyncio.sleep(0.1)
    pytest.fail("the store does not come back")


def free_port() -> int:
    """With room for a cluster's bus, which is 10,000 above."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port: int = listener.getsockname()[1]
        if port <= 55_535:
            return port


async def replica_is_up(replica: RedisServer) -> None:
    await until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.02)
    pytest.fail("the other process does not do its part")


# TLS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_over_tls_both_sides_show_certificates_that_the_other_knows(tmp_path: Path) -> None:
    certificates, others = tmp_path / "certificates", tmp_path / "others"
    for folder in (certificates, others):
        folder.mkdir()
        certify(folder)
    port = free_port()
    server = RedisServer(
        tmp_path / "redis",
        f"tls-port {port}",
        f"tls-cert-file {certificates / 'server.pem'}",
        f"tls-key-file {certificates / 'server.key'}",
        f"tls-ca-cert-file {certificates / 'ca.pem'}",
    )
    fields: dict[str, Any] = {
        "addresses": [f"127.0.0.1:{port}"],
        "ca_file": certificates / "ca.pem",
        "client_certificate_file": certificates / "client.pem",
        "client_key_file": certificates / "client.key",
    }
    own = {
        "client_certificate_file": others / "client.pem",
        "client_key_file": others / "client.key",
    }
    server.start()
    try:
        assert is_taken(RedisSettings(**fields))
        for changes in (
            {"ca_file": others / "ca.pem"},
            {"ca_file": None},
            {"client_certificate_file": None, "client_key_file": None},
            own,
            {"tls": False},
        ):
            settings = RedisSettings(**{**fields, **changes})
            assert "does not answer (budget.store)" in refusal(settings)
    finally:
        server.stop()
        # asyncio leaves the sockets of handshakes that fail as its loop ends to this.
        gc.collect()


# Several servers


@pytest.mark.slow
def test_in_a_cluster_each_tenant_lies_whole_on_one_node(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    nodes = [
        RedisServer(
            tmp_path / str(number),
            f"port {port}",
            "bind 127.0.0.1",
            "cluster-enabled yes",
        )
        for number, port in enumerate(ports)
    ]
    slots = ((0, 5460), (5461, 10922), (10923, 16383))
    try:
        for node, (first, last) in zip(nodes, slots, strict=True):
            node.start()
            assert node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)) == b"+OK\r\n"
        for port in ports[1:]:
            nodes[0].command("CLUSTER", "MEET", "127.0.0.1", str(port))
        asyncio.run(use_cluster(nodes, [f"127.0.0.1:{port}" for port in ports]))
    finally:
        for node in nodes:
            node.stop()


async def use_cluster(nodes: list[RedisServer], addresses: list[str]) -> None:
    for node in nodes:
        for _ in range(1000):
            info = node.command("CLUSTER", "INFO")
            if b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info:
                break
            await asyncio.sleep(0.02)
    settings = RedisSettings(
        addresses=addresses[:1], tls=False, cluster=True, timeout_ms=10_000, connections=4
    )
    async with ledger_on(settings) as ledger:
        tenants = [f"tenant-{number}" for number in range(12)]
        for tenant in tenants:
            account = Account(tenant=tenant, actor="alice")
            hold = await ledger.reserve(
                account,
                key("reserve", "k"),
                charges=[calls(4)],
                limits=[limit(10), limit(10, name="actor", scope=Scope.ACTOR)],
                ttl_seconds=60,
            )
            settled = await ledger.settle(
                account, key("settle", "k"), hold_id=hold.id, charges=None
            )
            assert settled.charges == (calls(4),)
        places = [
            {node.command("KEYS", f"pdp:{{t:{tenant}}}:*").count(b"pdp:") > 0 for node in nodes}
            for tenant in tenants
        ]
        assert all(place == {True, False} for place in places)
        assert sum(b"tenant-" in node.command("KEYS", "*") for node in nodes) > 1
        # A node that is gone for a moment is found again.
        nodes[1].kill()
        nodes[1].start()
        for tenant in tenants:
            account = Account(tenant=tenant, actor="alice")
            (state,) = await in_the_end(partial(ledger.state, account, limits=[limit(10)]))
            assert state.spent == 4


@pytest.mark.slow
def test_sentinels_name_the_primary_and_its_successor(tmp_path: Path) -> None:
    port, second_port, guard_port = free_port(), free_port(), free_port()
    fast = ("repl-diskless-sync-delay 0", "repl-ping-replica-period 1")
    primary = RedisServer(tmp_path / "primary", f"port {port}", *fast)
    second = RedisServer(
        tmp_path / "second", f"port {second_port}", f"replicaof 127.0.0.1 {port}", *fast
    )
    guard = RedisServer(
        tmp_path / "guard",
        f"port {guard_port}",
        f"sentinel monitor budgets 127.0.0.1 {port} 1",
        "sentinel down-after-milliseconds budgets 300",
        "sentinel failover-timeout budgets 2000",
        sentinel=True,
    )
    settings = RedisSettings(
        addresses=[f"127.0.0.1:{guard_port}"],
        tls=False,
        sentinel=Sentinel(service="budgets"),
        timeout_ms=2000,
    )

    async def scene() -> None:
        await replica_is_up(second)
        async with ledger_on(settings) as ledger:
            assert (await charge(ledger, "before")).id
            # The replica that is to take over has it all, and the sentinel has seen it.
            number = len(primary.keys("*"))
            await until(lambda: len(second.keys("*")) == number)
            await until(
                lambda: b"num-slaves\r\n$1\r\n1" in guard.command("SENTINEL", "MASTER", "budgets")
            )
            primary.kill()
            after = await in_the_end(partial(charge, ledger, "after"))
            assert after.note == "after"
            assert await spent(ledger) == 2

    try:
        primary.start()
        second.start()
        guard.start()
        asyncio.run(scene())
    finally:
        for server in (guard, primary, second):
            server.stop()
