from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdp.config import HttpSource
from pdp.policy.archive import MAX_ARCHIVE_BYTES
from pdp.policy.engine import BundleError
from pdp.policy.sources.connection import MAX_RETRY_AFTER_SECONDS, Pace
from pdp.policy.sources.http import MEDIA_TYPE, HttpBundleSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import Authority, archive, fetched, raw_server, web_server

SECRET = "s3cret-token"


def source(address: str, scheme: str = "http", **settings: Any) -> HttpBundleSource:
    url = f"{scheme}://{address}/bundles/acme.tar.gz?sig=query-secret"
    return HttpBundleSource(HttpSource(url=url, **settings))


def answering(
    body: bytes = b"", status: int = 200, **headers: str
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(
            body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    return handle


def refusal(address: str, tag: str | None = None, scheme: str = "http", **settings: Any) -> str:
    with pytest.raises(SourceError) as refused:
        fetched(source(address, scheme, **settings), tag)
    assert "query-secret" not in refused.value.message
    assert SECRET not in refused.value.message
    return refused.value.message


def test_a_bundle_is_fetched_once_for_each_etag() -> None:
    asked: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.headers.get("If-None-Match"))
        if asked[-1] == '"1"':
            return web.Response(status=304)
        return web.Response(body=archive(1), headers={"ETag": '"1"'})

    with web_server(handle) as address:
        first, second, third = fetched(source(address), None, '"1"', '"0"')
    assert first is not None
    assert (first.files, first.tag) == ({"data.json": b'{"number": 1}'}, '"1"')
    assert second is None
    assert third is not None
    assert asked == [None, '"1"', '"0"']


def test_without_an_etag_the_content_is_the_tag() -> None:
    with web_server(answering(archive(1))) as address:
        (first,) = fetched(source(address), None)
        assert first is not None
        assert fetched(source(address), first.tag) == [None]
        assert fetched(source(address), "sha256:else") != [None]


def test_the_token_is_read_anew_for_every_request_and_never_shown(tmp_path: Path) -> None:
    given: list[str | None] = []
    token_file = tmp_path / "token"

    async def handle(request: web.Request) -> web.Response:
        given.append(request.headers.get("Authorization"))
        return web.Response(status=403, body=SECRET.encode())

    with web_server(handle) as address:
        for number in (1, 2):
            token_file.write_text(f"{SECRET}-{number}\n")
            message = refusal(address, bearer_token_file=token_file)
            assert "403" in message
            assert "check what the credentials may read" in message
        token_file.write_text("two\nlines")
        assert "no single line of text" in refusal(address, bearer_token_file=token_file)
        token_file.unlink()
        assert "can not be read" in refusal(address, bearer_token_file=token_file)
    assert given == [f"Bearer {SECRET}-1", f"Bearer {SECRET}-2"]


@pytest.mark.parametrize(
    ("status", "said"),
    (
        (401, "check the credentials"),
        (404, "check the address"),
        (500, "status 500"),
        (503, "not to be had now"),
        (206, "status 206"),
        (304, "status 304"),
    ),
)
def test_every_other_status_is_an_error_that_says_what_to_do(status: int, said: str) -> None:
    with web_server(answering(status=status)) as address:
        message = refusal(address)
    assert said in message
    assert f"http://{address}/bundles/acme.tar.gz" in message


@pytest.mark.parametrize("status", (301, 302, 307, 308))
def test_no_redirect_is_followed(tmp_path: Path, status: int) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(SECRET)
    asked: list[web.Request] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(body=archive(1))

    with web_server(elsewhere) as other:
        redirect = answering(status=status, Location=f"http://{other}/")
        with web_server(redirect) as address:
            assert "is elsewhere" in refusal(address, bearer_token_file=token_file)
    assert asked == []


def test_what_is_no_bundle_is_refused_with_its_place() -> None:
    with web_server(answering(b"<html>")) as address, pytest.raises(BundleError) as refused:
        fetched(source(address), None)
    assert refused.value.message == (
        f"The policy bundle http://{address}/bundles/acme.tar.gz is not a whole .tar.gz."
    )


def test_an_encoding_that_was_not_asked_for_is_refused() -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)
    with web_server(answering(bomb, Content_Encoding="gzip")) as address:
        assert "encoding" in refusal(address)


def test_an_endless_body_is_cut_at_the_bound() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"\0" * 1_000_000)

    with web_server(handle) as address:
        assert f"larger than {MAX_ARCHIVE_BYTES} bytes" in refusal(address)


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {MAX_ARCHIVE_BYTES + 1}\r\n\r\n".encode()
    with raw_server(head, hold=True) as address:
        assert "larger than" in refusal(address)


@pytest.mark.parametrize(
    "pieces",
    (
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",),
        (b"not http at all",),
        (b"",),
    ),
    ids=("cut", "huge header", "no http", "nothing"),
)
def test_a_broken_answer_is_an_error(pieces: tuple[bytes, ...]) -> None:
    with raw_server(*pieces) as address:
        assert "can not be reached" in refusal(address)


def test_a_slow_answer_is_cut_at_the_timeout() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    with raw_server(head, hold=True) as address:
        assert "did not come within 0.2 seconds" in refusal(address, timeout_seconds=0.2)


def test_nobody_listening_is_an_error() -> None:
    with raw_server() as address:
        pass
    assert "can not be reached" in refusal(address)


def test_a_server_of_another_authority_is_not_believed(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    with web_server(answering(archive(1)), tls=theirs.server_context()) as address:
        message = refusal(address, scheme="https", ca_file=ours.file)
        assert "its certificate is not one that is trusted here" in message
        (found,) = fetched(source(address, "https", ca_file=theirs.file), None)
        assert found is not None


def test_a_client_certificate_is_shown_where_it_is_asked_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca", "ca")
    certificate, key = authority.issue("sidecar")
    context = authority.server_context(needs_client=True)
    with web_server(answering(archive(1)), tls=context) as address:
        refusal(address, scheme="https", ca_file=authority.file)
        settings: dict[str, Any] = {"client_certificate_file": certificate, "client_key_file": key}
        (found,) = fetched(source(address, "https", ca_file=authority.file, **settings), None)
        assert found is not None
        key.write_text("no key")
        message = refusal(address, scheme="https", ca_file=authority.file, **settings)
        assert "a certificate or key can not be used" in message


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        raw_server(b"HTTP/1.1 502 No\r\n\r\n") as proxy,
        web_server(answering(archive(1))) as address,
    ):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy}")
        (found,) = fetched(source(address), None)
    assert found is not None


def test_a_server_that_holds_the_request_is_asked_again_at_once() -> None:
    prefers: list[str | None] = []
    changed = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        prefers.append(request.headers.get("Prefer"))
        if request.headers.get("If-None-Match") == '"1"':
            await asyncio.wait_for(changed.wait(), 10)
            return web.Response(
                body=archive(2), headers={"ETag": '"2"', "Content-Type": MEDIA_TYPE}
            )
        asyncio.get_running_loop().call_later(0.3, changed.set)
        return web.Response(body=archive(1), headers={"ETag": '"1"', "Content-Type": MEDIA_TYPE})

    async def run(address: str) -> None:
        held = source(address, long_poll_seconds=5, poll_seconds=1000, timeout_seconds=0.2)
        first = await held.fetch(None)
        assert first is not None
        await asyncio.wait_for(held.wait(), 5)
        second = await held.fetch(first.tag)
        assert second is not None
        assert second.tag == '"2"'
        await held.close()

    with web_server(handle) as address:
        asyncio.run(run(address))
    assert prefers == ["modes=snapshot", "modes=snapshot,delta;wait=5"]


def test_a_server_that_does_not_hold_requests_is_polled() -> None:
    async def run(address: str) -> None:
        polled = source(address, long_poll_seconds=5, poll_seconds=1000)
        await polled.fetch(None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(polled.wait(), 0.1)
        await polled.close()

    with web_server(answering(archive(1), ETag='"1"')) as address:
        asyncio.run(run(address))


def test_failures_make_the_pace_slower_and_a_success_ends_that() -> None:
    pace = Pace(60)
    longest = []
    for _ in range(10):
        pace.failed()
        longest.append(max(pace.seconds() for _ in range(20)))
    assert longest[0] <= 1
    assert longest == sorted(longest[:6]) + longest[6:]
    assert all(seconds <= 60 for seconds in longest)
    pace.went_well()
    assert all(54 <= pace.seconds() <= 66 for _ in range(50))
    assert pace.seconds(at_once=True) == 0


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    (("7", 7.0), ("99999999", MAX_RETRY_AFTER_SECONDS), ("soon", None), ("-1", None), ("٣", None)),
)
def test_a_server_may_ask_for_a_pause_within_bounds(
    retry_after: str, expected: float | None
) -> None:
    pace = Pace(60)
    pace.failed(retry_after)
    assert (pace.seconds() == expected) if expected is not None else (pace.seconds() <= 1)


def test_a_held_connection_costs_the_loop_nothing() -> None:
    """Another task goes on while a server drips."""

    async def run(address: str) -> float:
        dripping = source(address, timeout_seconds=0.5)
        slow = asyncio.create_task(dripping.fetch(None))
        longest, last = 0.0, time.perf_counter()
        while not slow.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        await asyncio.gather(slow, return_exceptions=True)
        await dripping.close()
        return longest

    with raw_server(b"HTTP/1.1 200 OK\r\n", hold=True) as address:
        assert asyncio.run(run(address)) < 0.5
