"""What a token issuer's server, or a SPIFFE agent, answers where keys are asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Final

from google.protobuf.message import DecodeError

from pdp.api.spiffe.workload_pb2 import JWTBundlesResponse
from pdp.canonical import JsonValue
from pdp.errors import FetchError
from pdp.identity.jwks_http import DiscoveredJwks, JwksUrl
from pdp.identity.spiffe_bundles import SpiffeBundle
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, at_once
from tests.fuzz.targets.key_sets import SET

DOMAIN: Final = "spiffe://example.org"
STATUSES: Final = (
    b"200 OK", b"304 Not Modified", b"302 Found", b"401 No", b"204 None", b"100 Continue", b"999 x",
    b"200", b"-1 x", b"503 Later", b"206 Partial",
)  # fmt: skip
HEADERS: Final = (
    b'ETag: "1"', b"ETag: " + b"e" * 5_000, b"Content-Encoding: gzip", b"Transfer-Encoding: chunked",
    b"Content-Length: 5", b"Content-Length: 99999999999", b"Content-Length: -1", b"Retry-After: x",
    b"Location: http://169.254.169.254/", b"Set-Cookie: a=b", b"X: \xff\0", b" folded", b"no colon",
    b"X: " + b"y" * 20_000, b"Connection: keep-alive", b"Content-Type: text/html; charset=\x80",
)  # fmt: skip


def samples() -> Iterable[bytes]:
    yield b"\0\0"
    yield b"\0\1"
    yield b"\1"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    if choices.number(2) == 1:
        return _agent(choices)
    return asyncio.run(_issuer(choices, discovers=choices.number(2) == 1))


async def _issuer(choices: Choices, *, discovers: bool) -> bool:
    keys = _response(json.dumps(_changed(SET, choices)).encode("utf-8", "surrogatepass"), choices)
    answers = [keys, keys]
    seed = choices.take(32) if discovers else b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if answers:
                writer.write(answers.pop(0))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        place = f"http://127.0.0.1:{port}"
        if discovers:
            document: JsonValue = {"issuer": place, "jwks_uri": f"{place}/keys", "note": SECRET}
            more = Choices(seed)
            said = json.dumps(_changed(document, more)).encode("utf-8", "surrogatepass")
            answers.insert(0, _response(said, more))
        source = DiscoveredJwks(place, ca_file=None) if discovers else JwksUrl(place, ca_file=None)
        try:
            found = await source.fetch()
        except FetchError as error:
            assert SECRET not in f"{error} {error!r}"  # noqa: PT017 - what it shows
            return False
        finally:
            await source.close()
        assert {key.algorithm for key in found.values()} <= {"EdDSA", "ES256", "RS256"}
        return jose.KID in found


def _changed(value: JsonValue, choices: Choices) -> JsonValue:
    """Not always, so that something else may be."""
    return edited(value, Choices(choices.take(24))) if choices.number(4) == 1 else value


def _response(body: bytes, choices: Choices) -> bytes:
    if choices.number(8) == 1:
        return choices.some()
    headers = [b"HTTP/1.1 " + choices.pick(STATUSES)]
    headers += [
        choices.pick(HEADERS) if choices.number(4) else choices.some()
        for _ in range(choices.number(4))
    ]
    if choices.number(4) != 1:
        headers.append(b"Content-Length: %d" % len(body))
    response = b"\r\n".join([*headers, b"", body])
    return edited_bytes(response, choices) if choices.number(4) == 1 else response


class _Bundle(SpiffeBundle):
    """The agent has answered."""

    def __init__(self, answer: JWTBundlesResponse) -> None:
        super().__init__("unix:///agent", trust_domain=DOMAIN)
        self._answer = answer

    async def _first_answer(self) -> JWTBundlesResponse:
        return self._answer


def _agent(choices: Choices) -> bool:
    content = json.dumps(_changed(SET, choices)).encode("utf-8", "surrogatepass")
    name = choices.pick([DOMAIN, "example.org", "spiffe://other.org", ""])
    message = JWTBundlesResponse(bundles={name: content}).SerializeToString()
    if choices.number(4) == 1:
        message = edited_bytes(message, choices)
    try:
        answer = JWTBundlesResponse.FromString(message)
    except DecodeError:  # gRPC ends the call, before any of us is asked
        return False
    try:
        found = at_once(_Bundle(answer).fetch())
    except FetchError:
        return False
    assert {DOMAIN, "example.org"} & set(answer.bundles), "another domain's keys are taken"
    return jose.KID in found
