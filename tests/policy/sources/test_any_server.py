"""Whatever a server does, a source gives what it holds, or an error of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp.config import HttpSource, OciSource
from pdp.policy.engine import BundleError
from pdp.policy.sources.http import MEDIA_TYPE, HttpBundleSource
from pdp.policy.sources.oci import OciBundleSource
from pdp.policy.sources.source import BundleSource, SourceError
from tests.policy.sources.servers import FakeRegistry, Handler, archive, web_server

FAULTS = (
    "cut", "cut chunk", "cut without length", "longer", "flip", "garbage", "empty", "gzip",
    "redirect", "no address", "reset", "304", "401", "404", "429", "500",
)  # fmt: skip


@dataclass
class Faulty:
    """A server, or one that does to each answer what the next fault says."""

    handler: Handler
    faults: list[str] = field(default_factory=list)
    position: int = 0
    """Where, in percent, an answer is cut or changed."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        answer = await self.handler(request)
        fault = self.faults.pop(0) if self.faults else "none"
        assert isinstance(answer, web.Response)
        body = answer.body if isinstance(answer.body, bytes) else b""
        part = body[: len(body) * self.position // 100]
        if fault == "none":
            return answer
        if fault.isdecimal():
            return web.Response(status=int(fault), body=body)
        if fault in {"redirect", "no address"}:
            return web.Response(
                status=307, headers={"Location": "http://[" if fault == "no address" else "/else"}
            )
        if fault in {"flip", "garbage", "empty", "gzip"}:
            flipped = part[:-1] + bytes(b ^ 1 for b in part[-1:]) + body[len(part) :]
            answer.body = {"flip": flipped, "garbage": b"<html>", "empty": b"", "gzip": body}[fault]
            if fault == "gzip":
                answer.headers["Content-Encoding"] = "gzip"
            return answer
        head = {
            "cut": f"Content-Length: {len(body) + 1}\r\n",
            "cut chunk": f"Transfer-Encoding: chunked\r\n\r\n{len(body) + 1:x}",
            "longer": f"Content-Length: {len(part)}\r\n",
        }.get(fault, "")
        assert request.transport is not None
        if fault != "reset":
            tag = f"ETag: {answer.headers['ETag']}\r\n" if "ETag" in answer.headers else ""
            content = body if fault == "longer" else part
            raw = f"HTTP/1.1 200 OK\r\n{tag}{head}\r\n".encode() + content
            request.transport.write(raw)
            request.transport.close()
        else:
            request.transport.abort()
        return web.Response()


@dataclass
class BundleServer:
    number: int = 0
    with_etag: bool = True

    async def handle(self, request: web.Request) -> web.Response:
        etag = f'"{self.number}"'
        if self.with_etag and request.headers.get("If-None-Match") == etag:
            return web.Response(status=304)
        headers = {"Content-Type": MEDIA_TYPE} | ({"ETag": etag} if self.with_etag else {})
        return web.Response(body=archive(self.number), headers=headers)


Step = tuple[bool, list[str], int]
"""Whether the content changes first, what is done to the next answers, and where."""
STEPS = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.sampled_from(FAULTS) | st.just("none"), max_size=4),
        st.integers(0, 100),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def bundle_server() -> Iterator[tuple[str, Faulty, BundleServer]]:
    holds = BundleServer()
    faulty = Faulty(holds.handle)
    with web_server(faulty.handle) as address:
        yield address, faulty, holds


@pytest.fixture(scope="module")
def registry() -> Iterator[tuple[str, Faulty, FakeRegistry]]:
    holds = FakeRegistry(auth="token")
    faulty = Faulty(holds.handle)
    with web_server(faulty.handle) as address:
        yield address, faulty, holds


async def follow(
    source: BundleSource, faulty: Faulty, put: Callable[[int], object], steps: list[Step]
) -> None:
    """Fetch once in each step, and once more from a server that is well again."""
    known: dict[str, int] = {}
    tag, number = None, 0
    for changes, faults, position in [*steps, (False, [], 0)]:
        number += changes
        put(number)
        faulty.faults, faulty.position = list(faults), position
        try:
            fetched = await source.fetch(tag)
        except (SourceError, BundleError):
            assert set(faults) - {"none"}
            continue
        if fetched is not None:
            assert json.loads(fetched.files["data.json"]) == {"number": number}
            tag = fetched.tag
            known[tag] = number
        elif "304" not in faults:  # which says, and may lie, that nothing changed
            assert tag is not None
            assert known[tag] == number
    await source.close()


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, with_etag=st.booleans())
def test_a_bundle_server_gives_what_it_holds_or_an_error(
    bundle_server: tuple[str, Faulty, BundleServer], *, steps: list[Step], with_etag: bool
) -> None:
    address, faulty, holds = bundle_server
    holds.with_etag = with_etag
    source = HttpBundleSource(HttpSource(url=f"http://{address}/b.tar.gz", long_poll_seconds=1))
    asyncio.run(follow(source, faulty, lambda number: setattr(holds, "number", number), steps))


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_a_registry_gives_what_it_holds_or_an_error(
    registry: tuple[str, Faulty, FakeRegistry], *, steps: list[Step]
) -> None:
    address, faulty, holds = registry
    image = f"{address}/policies/acme:1"
    source = OciBundleSource(OciSource(image=image, plain_http=True))
    asyncio.run(follow(source, faulty, lambda n: holds.push("1", archive(n)), steps))
