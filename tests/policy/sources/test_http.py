from __future__ import annotations

import asyncio
import contextlib
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdp.config import BundleSettings, HttpSource
from pdp.policy.archive import MAX_ARCHIVE_BYTES
from pdp.policy.engine import BundleError
from pdp.policy.sources import open_source
from pdp.policy.sources.http import LEAST_SECONDS, MEDIA_TYPE, HttpBundleSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import (
    Authority,
    answering,
    archive,
    fetched,
    raw_server,
    web_server,
)

SECRET = "s3cret-token"


def source(
    address: str, scheme: str = "http", clock: Callable[[], float] = time.monotonic, **settings: Any
) -> HttpBundleSource:
    url = f"{scheme}://{address}/bundles/acme.tar.gz?sig=query-secret"
    return HttpBundleSource(HttpSource(url=url, **settings), clock=clock)


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
        (503, "check the server"),
        (429, "raise poll_seconds"),
        (206, "status 206"),
        (204, "status 204"),
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
        assert "Content-Encoding" in refusal(address)


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


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n"


@pytest.mark.parametrize(
    ("pieces", "said"),
    (
        ((HEAD + b"\r\nshort",), "the answer broke off"),
        ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort",), "broke off"),
        ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",), "is not HTTP"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",), "is not HTTP"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",), "is not HTTP"),
        ((HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n",), "is not HTTP"),
        ((HEAD + b"X: x\r\n" * 100_000 + b"\r\n",), "is not HTTP"),
        ((b"not http at all",), "is not HTTP"),
        ((b"",), "the server hung up"),
    ),
    ids=(
        "cut", "cut chunk", "bad chunk", "two lengths", "bad length",
        "huge header", "many headers", "no http", "nothing",
    ),
)  # fmt: skip
def test_a_broken_answer_is_an_error(pieces: tuple[bytes, ...], said: str) -> None:
    with raw_server(*pieces) as address:
        assert said in refusal(address)


def test_a_connection_that_is_reset_midway_is_an_error() -> None:
    with raw_server(HEAD + b"\r\nsome", reset=True) as address:
        assert "can not be fetched" in refusal(address)


def test_an_answer_without_a_length_that_was_cut_is_refused() -> None:
    cut = b"HTTP/1.1 200 OK\r\n\r\n" + archive(1)[:-10]
    with raw_server(cut) as address, pytest.raises(BundleError, match="not a whole"):
        fetched(source(address), None)


def test_a_slow_answer_is_cut_at_the_timeout() -> None:
    with raw_server(HEAD + b"\r\n", hold=True) as address:
        assert "did not come within 0.2 seconds" in refusal(address, timeout_seconds=0.2)


@pytest.mark.parametrize(
    "dripped",
    (
        [HEAD + b"\r\n"] + [b"x"] * 99,
        [b"HTTP/1.1 200 OK\r\n"] + [b"X"] * 99,
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 99,
    ),
)
def test_an_answer_that_drips_is_cut_at_the_timeout(dripped: list[bytes]) -> None:
    with raw_server(*dripped, drip_seconds=0.02) as address:
        assert "did not come within 0.2 seconds" in refusal(address, timeout_seconds=0.2)


def test_nobody_listening_is_an_error() -> None:
    with raw_server() as address:
        pass
    assert "the server can not be reached" in refusal(address)


def test_a_server_of_another_authority_is_not_believed(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    with web_server(answering(archive(1)), tls=theirs.server_context()) as address:
        message = refusal(address, scheme="https", ca_file=ours.file)
        assert "the server's certificate is not one to be trusted" in message
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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Holder:
    """A server that holds requests, and says so: every held request takes so long."""

    def __init__(self, clock: Clock, seconds: float = 4.0, media_type: str = MEDIA_TYPE) -> None:
        self.clock = clock
        self.seconds = seconds
        self.etag = '"1"'
        self.media_type = media_type
        self.prefers: list[str | None] = []

    async def handle(self, request: web.Request) -> web.Response:
        self.prefers.append(request.headers.get("Prefer"))
        if request.headers.get("If-None-Match") == self.etag:
            self.clock.now += self.seconds
            return web.Response(status=304)
        headers = {"ETag": self.etag, "Content-Type": self.media_type}
        return web.Response(body=archive(1), headers=headers)


def waits(held: HttpBundleSource, *tags: str | None, clock: Clock | None = None) -> list[bool]:
    """For each tag, whether the wait after its fetch is short."""

    async def run() -> list[bool]:
        found = []
        for tag in tags:
            with contextlib.suppress(SourceError, BundleError):
                await held.fetch(tag)
            if clock is not None:
                clock.now += LEAST_SECONDS
            try:
                await asyncio.wait_for(held.wait(), 0.1)
            except TimeoutError:
                found.append(False)
            else:
                found.append(True)
        await held.close()
        return found

    return asyncio.run(run())


def test_a_server_that_holds_requests_is_asked_again_at_once() -> None:
    clock = Clock()
    holder = Holder(clock)
    with web_server(holder.handle) as address:
        held = source(address, clock=clock, long_poll_seconds=5, poll_seconds=1000)
        # An answer of 304 says nothing of holding, and changes nothing.
        assert waits(held, None, '"1"', '"1"', clock=clock) == [True, True, True]
    assert holder.prefers == ["modes=snapshot"] + ["modes=snapshot,delta;wait=5"] * 2


def test_a_change_ends_a_held_request() -> None:
    changed = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        if request.headers.get("If-None-Match") == '"1"':
            asyncio.get_running_loop().call_later(0.3, changed.set)
            await changed.wait()
            headers = {"ETag": '"2"', "Content-Type": MEDIA_TYPE}
            return web.Response(body=archive(2), headers=headers)
        return web.Response(body=archive(1), headers={"ETag": '"1"', "Content-Type": MEDIA_TYPE})

    with web_server(handle) as address:
        # Longer than timeout_seconds, which does not count while the server holds.
        held = source(address, long_poll_seconds=5, timeout_seconds=0.2)
        (second,) = fetched(held, '"1"')
    assert second is not None
    assert (second.tag, second.files) == ('"2"', {"data.json": b'{"number": 2}'})


def test_a_request_that_is_held_too_long_is_cut() -> None:
    with raw_server(b"", hold=True) as address:
        message = refusal(address, '"1"', long_poll_seconds=1, timeout_seconds=0.2)
    assert "did not come within 1.2 seconds" in message


def test_the_first_look_after_a_start_may_be_held_at_once() -> None:
    """What is in force was fetched by another source, when the sidecar started."""

    async def run() -> None:
        held = source("127.0.0.1:1", long_poll_seconds=5, poll_seconds=1000)
        await asyncio.wait_for(held.wait(), 5)

    asyncio.run(run())


def test_a_server_that_only_promises_to_hold_requests_is_polled() -> None:
    clock = Clock()
    with web_server(Holder(clock, seconds=0.0).handle) as address:
        polled = source(address, clock=clock, long_poll_seconds=5, poll_seconds=1000)
        assert waits(polled, '"1"', clock=clock) == [False]


def test_who_asks_for_the_same_again_and_again_is_slowed_down() -> None:
    clock = Clock()
    with web_server(Holder(clock).handle) as address:
        held = source(address, clock=clock, long_poll_seconds=5, poll_seconds=1000)
        assert waits(held, None, None, clock=clock) == [True, False]


def test_a_server_that_sends_the_same_again_and_again_is_polled() -> None:
    clock = Clock()
    heedless = answering(archive(1), ETag='"1"', Content_Type=MEDIA_TYPE)
    with web_server(heedless) as address:
        polled = source(address, clock=clock, long_poll_seconds=5, poll_seconds=1000)
        assert waits(polled, '"1"', clock=clock) == [False]


@pytest.mark.parametrize(
    ("media_type", "settings"),
    (("application/gzip", {"long_poll_seconds": 5}), (MEDIA_TYPE, {})),
)
def test_a_server_that_does_not_hold_requests_is_polled(
    media_type: str, settings: dict[str, Any]
) -> None:
    clock = Clock()
    with web_server(Holder(clock, media_type=media_type).handle) as address:
        polled = source(address, clock=clock, poll_seconds=1000, **settings)
        assert waits(polled, None, clock=clock) == [False]


def test_however_often_the_content_changes_a_pause_is_kept() -> None:
    with web_server(Holder(Clock()).handle) as address:
        held = source(address, long_poll_seconds=5, poll_seconds=1000)
        assert waits(held, None) == [False]


def test_what_is_no_bundle_is_not_asked_for_again_at_once() -> None:
    clock = Clock()
    broken = answering(b"<html>", ETag='"2"', Content_Type=MEDIA_TYPE)
    with web_server(broken) as address:
        held = source(address, clock=clock, long_poll_seconds=5, poll_seconds=1000)
        assert waits(held, '"1"', clock=clock) == [False]


def test_without_an_etag_nothing_can_be_held_or_be_a_delta() -> None:
    prefers = []

    async def handle(request: web.Request) -> web.Response:
        prefers.append((request.headers.get("Prefer"), request.headers.get("If-None-Match")))
        return web.Response(body=archive(1), headers={"Content-Type": MEDIA_TYPE})

    clock = Clock()
    with web_server(handle) as address:
        polled = source(address, clock=clock, long_poll_seconds=5, poll_seconds=1000)
        (first,) = fetched(polled, None)
        assert first is not None
        assert waits(polled, first.tag, clock=clock) == [False]
    assert prefers == [("modes=snapshot", None)] * 2


def test_another_etag_of_the_same_content_is_a_new_tag() -> None:
    with web_server(answering(archive(1), ETag='W/"2"')) as address:
        (found,) = fetched(source(address), '"1"')
    assert found is not None
    assert (found.tag, found.files) == ('W/"2"', {"data.json": b'{"number": 1}'})


@pytest.mark.parametrize(
    ("etag", "said"), ((b'"\xc3\xa4"', "not printable"), (b"x" * 2000, "more than 1024"))
)
def test_an_etag_that_can_not_be_sent_back_is_an_error(etag: bytes, said: str) -> None:
    body = archive(1)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nETag: %b\r\n\r\n" % (len(body), etag)
    with raw_server(head + body) as address:
        assert said in refusal(address)


def test_a_cookie_is_not_kept() -> None:
    given = []

    async def handle(request: web.Request) -> web.Response:
        given.append(request.headers.get("Cookie"))
        return web.Response(body=archive(1), headers={"Set-Cookie": "a=b"})

    with web_server(handle) as address:
        # Cookies are kept for names only.
        fetched(source(address.replace("127.0.0.1", "localhost")), None, None)
    assert given == [None, None]


def test_the_configuration_opens_a_bundle_server() -> None:
    settings = BundleSettings(http=HttpSource(url="https://h.example/a.tar.gz?sig=1"))
    opened = open_source(settings)
    assert isinstance(opened, HttpBundleSource)
    assert opened.place == "https://h.example/a.tar.gz"


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
