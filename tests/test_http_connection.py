from __future__ import annotations

import asyncio
import itertools
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from pdp.errors import FetchError, PdpError
from pdp.http_connection import (
    MAX_SECRET_BYTES,
    Connection,
    Reply,
    shown,
)
from pdp.pace import MAX_RETRY_AFTER_SECONDS, Pace
from pdp.reason import ReasonCode
from tests.policy.sources.servers import Authority, answering, web_server

ANY = FetchError(ReasonCode.INTERNAL, "It failed.")


def fault(what: str) -> FetchError:
    return FetchError(ReasonCode.INTERNAL, f"The thing {what}.")


def asked(address: str, connection: Connection, *, scheme: str = "http", query: str = "") -> Reply:
    async def run() -> Reply:
        try:
            return await connection.request(
                f"{scheme}://{address}/{query}", headers={}, max_bytes=1000, timeout_seconds=10
            )
        finally:
            await connection.close()

    return asyncio.run(run())


def test_what_is_shown_of_a_url_holds_no_credential() -> None:
    assert shown("https://u:p@h.example:1/a/b.tar.gz?sig=1#2") == "https://h.example:1/a/b.tar.gz"


def test_a_signed_query_arrives_as_it_was_written() -> None:
    given = []

    async def handle(request: web.Request) -> web.Response:
        given.append(request.raw_path)
        return web.Response()

    query = "?sig=a%2Fb%2B%7e%41+c&x=%2f"
    with web_server(handle) as address:
        asked(address, Connection(fault, ca_file=None), query=query)
    assert given == [f"/{query}"]


def test_the_body_of_an_error_is_not_read() -> None:
    with web_server(answering(b"secret " * 1000, status=500)) as address:
        reply = asked(address, Connection(fault, ca_file=None))
    assert (reply.status, reply.body) == (500, b"")
    assert "secret" not in repr(reply)


@pytest.mark.parametrize("encoding", ("gzip", "br", "identity, gzip"))
def test_an_encoding_that_was_not_asked_for_is_refused(encoding: str) -> None:
    with (
        web_server(answering(b"x", Content_Encoding=encoding)) as address,
        pytest.raises(FetchError, match="Content-Encoding"),
    ):
        asked(address, Connection(fault, ca_file=None))


def test_certificates_that_are_replaced_are_read_anew(tmp_path: Path) -> None:
    """As cert-manager renews them: the sidecar runs on."""
    old, new = Authority(tmp_path / "old", "old"), Authority(tmp_path / "new", "new")
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(old.file.read_bytes())
    connection = Connection(fault, ca_file=ca_file)

    async def run(first: str, second: str) -> list[str]:
        said = []
        for address in (first, second):
            try:
                await connection.request(
                    f"https://{address}/", headers={}, max_bytes=1, timeout_seconds=10
                )
            except FetchError as error:
                said.append(error.message)
            else:
                said.append("ok")
            ca_file.write_bytes(new.file.read_bytes() + b"\n")
        await connection.close()
        return said

    with (
        web_server(answering(), tls=old.server_context()) as first,
        web_server(answering(), tls=new.server_context()) as second,
    ):
        assert asyncio.run(run(first, second)) == ["ok", "ok"]


ON_A_TERMINAL = """
import asyncio, fcntl, pathlib, sys, termios
from pdp.errors import FetchError
from pdp.http_connection import Connection

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # OpenSSL asks whoever is at the terminal
certificate = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
fault = lambda what: FetchError("internal", f"The thing {what}.")
connection = Connection(fault, ca_file=None, client_certificate=certificate)
try:
    asyncio.run(
        connection.request("https://127.0.0.1:1/", headers={}, max_bytes=1, timeout_seconds=3)
    )
except Exception as error:
    print(error)
"""


def test_a_key_with_a_password_is_an_error_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path / "ca", "ca").issue("sidecar", password=b"secret")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", ON_A_TERMINAL, certificate, key],
            stdin=theirs,
            capture_output=True,
            text=True,
            start_new_session=True,
            check=True,
            timeout=20,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout.endswith("can not be asked for: a certificate or key can not be used.\n")


def test_a_certificate_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="a certificate or key can not be used"):
        asked("127.0.0.1:1", Connection(fault, ca_file=tmp_path / "none.pem"))


@pytest.mark.parametrize("content", (b"", b" \n", b"a\nb", b"a\0", b"a" * (MAX_SECRET_BYTES + 1)))
def test_a_secret_is_one_line_of_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(FetchError, match="holds no single line of text"):
        asyncio.run(Connection(fault, ca_file=None).secret(tmp_path / "secret"))


def test_a_pace_is_regular_and_moved_by_up_to_a_tenth() -> None:
    drawn = itertools.cycle((0.0, 0.5, 1.0))
    pace = Pace(60, draw=lambda: next(drawn))
    pace.seconds()
    next(drawn), next(drawn)
    assert [pace.seconds() for _ in range(3)] == pytest.approx([54, 60, 66])
    assert pace.seconds(regular=0.5) == 0.5


@pytest.mark.parametrize(("drawn", "waits"), ((0.0, 0), (0.25, 15), (1.0, 60)))
def test_sidecars_that_start_together_do_not_ask_together(drawn: float, waits: float) -> None:
    assert Pace(60, draw=lambda: drawn).seconds() == waits


def test_failures_make_the_pace_slower_and_a_success_ends_that() -> None:
    pace = Pace(20, draw=lambda: 1.0)
    waits = []
    for _ in range(2000):
        pace.failed(ANY)
        waits.append(pace.seconds(regular=0.0))
    assert waits[:7] == [1, 2, 4, 8, 16, 20, 20]
    assert waits[-1] == 20
    pace.went_well()
    assert pace.seconds(regular=0.0) == 0.0
    pace.failed(PdpError(ReasonCode.INTERNAL, "It is not what it should be."))
    assert pace.seconds(regular=0.0) == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    (
        ({}, 1.0),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0"}, 1.0),
        ({"Retry-After": "9" * 400}, MAX_RETRY_AFTER_SECONDS),
        ({"Retry-After": "soon"}, 1.0),
        ({"Retry-After": "-5"}, 1.0),
        ({"Retry-After": "٣"}, 1.0),
        (
            {
                "Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT",
                "Date": "Wed, 21 Oct 2015 07:28:00 GMT",
            },
            30.0,
        ),
        (
            {
                "Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT",
                "Date": "Wed, 21 Oct 2015 07:28:30 GMT",
            },
            1.0,
        ),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "now"}, 1.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 -0000", "Date": "0"}, 1.0),
    ),
)
def test_a_server_may_ask_for_a_pause_within_bounds(
    headers: dict[str, str], expected: float
) -> None:
    connection = Connection(fault, ca_file=None)

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=503, headers=headers)

    with web_server(answer) as address:
        error = connection.status_error(asked(address, connection))
    pace = Pace(60, draw=lambda: 0.0)
    pace.failed(error)
    assert pace.seconds() == pytest.approx(max(0.5, expected if expected > 1 else 0.5))


def test_a_pause_that_was_asked_for_ends_with_the_next_answer() -> None:
    with web_server(answering(status=429, Retry_After="50")) as address:
        connection = Connection(fault, ca_file=None)
        error = connection.status_error(asked(address, connection))
    assert (error.status, error.retry_after_seconds) == (429, 50.0)
    pace = Pace(20, draw=lambda: 0.0)
    pace.failed(error)
    assert pace.seconds() == 50
    pace.failed(ANY)
    assert pace.seconds() == 1
