"""Where keys are from: what is asked, what is believed, and what is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdp.identity.jwks_file import JwksFile
from pdp.identity.jwks_http import DiscoveredJwks, JwksUrl
from pdp.identity.key_source import KeyFetcher, KeySourceError
from pdp.identity.keys import MAX_JWKS_BYTES, MAX_KEYS, IssuerKey
from pdp.testing import TokenIssuer
from tests.identity.identity_provider import IdentityProvider, public_jwk
from tests.policy.sources.servers import Authority, answering, raw_server, web_server

ONE, TWO = TokenIssuer(kid="one"), TokenIssuer(kid="two")
SECRET = "s3cret-token"


@pytest.fixture
def idp() -> IdentityProvider:
    idp = IdentityProvider()
    idp.publish(ONE)
    return idp


@pytest.fixture
def address(idp: IdentityProvider) -> Iterator[str]:
    with web_server(idp.handle) as address:
        yield address


def fetched(fetcher: KeyFetcher, times: int = 1) -> list[Mapping[str, IssuerKey]]:
    async def run() -> list[Mapping[str, IssuerKey]]:
        try:
            return [await fetcher.fetch() for _ in range(times)]
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(fetcher: KeyFetcher) -> str:
    with pytest.raises(KeySourceError) as refused:
        fetched(fetcher)
    assert refused.value.reason_code == "keys_unavailable"
    assert refused.value.message.startswith(f"The key set {fetcher.place} ")
    for secret in (SECRET, "query-secret"):
        assert secret not in refused.value.message
    return refused.value.message


def at(address: str, **settings: Any) -> JwksUrl:
    return JwksUrl(f"http://{address}/jwks.json?k=query-secret", **{"ca_file": None, **settings})


def jwks(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def test_keys_are_taken_from_a_url_and_again_only_when_they_change(
    address: str, idp: IdentityProvider
) -> None:
    async def run() -> None:
        source = at(address)
        first = await source.fetch()
        assert await source.fetch() is first
        assert idp.headers[-1]["If-None-Match"]
        idp.publish(ONE, TWO)
        both = await source.fetch()
        assert set(both) == {"one", "two"}
        assert both["one"] == first["one"]
        await source.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "problem"),
    (
        (b"", "is not JSON"),
        (b"<html>Sign in</html>", "is not JSON"),
        (b"\x1f\x8b\x08\x00", "is not UTF-8"),
        (b"[]", "must be a JSON object"),
        (b"{}", 'needs "keys"'),
        (b'{"keys": {}}', 'needs "keys"'),
        (b'{"keys": [], "keys": []}', "duplicate key"),
        (b'{"keys": [1]}', "not an object"),
        (b"[" * 100_000, "is nested more than"),
        (jwks(*[public_jwk(ONE)] * (MAX_KEYS + 1)), "a list of at most 100 keys"),
        (jwks(public_jwk(ONE), public_jwk(ONE)), "without a kid of its own"),
        (jwks(public_jwk(ONE), {"kty": "oct", "k": "AAAA", "kid": "x"}), "private or symmetric"),
        (jwks({**public_jwk(ONE), "d": "AAAA"}), "private or symmetric"),
    ),
)
def test_what_is_no_key_set_is_refused(body: bytes, problem: str) -> None:
    with web_server(answering(body)) as address:
        assert problem in refusal(at(address))


@pytest.mark.parametrize(
    "passed_over",
    (
        {"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA", "kid": "x"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "x"},
        {"kty": "new", "kid": "x"},
        {"kty": ["OKP"], "kid": "x"},
        {**public_jwk(TWO), "use": "enc"},
        {**public_jwk(TWO), "use": ["sig"]},
        {**public_jwk(TWO), "use": "jwt-svid"},
        {**public_jwk(TWO), "key_ops": ["sign"]},
        {**public_jwk(TWO), "key_ops": "verify"},
        {**public_jwk(TWO), "alg": "HS256"},
        {**public_jwk(TWO), "alg": None},
        {**public_jwk(TWO), "kid": ""},
        {**public_jwk(TWO), "kid": "k" * 256},
        {**public_jwk(TWO), "kid": 7},
        {**public_jwk(TWO), "x": "AA"},
        {**public_jwk(TWO), "crv": "Ed448"},
        {name: value for name, value in public_jwk(TWO).items() if name != "kid"},
    ),
)
def test_a_key_that_can_not_be_used_is_passed_over(passed_over: dict[str, Any]) -> None:
    with web_server(answering(jwks(passed_over, public_jwk(ONE)))) as address:
        assert set(fetched(at(address))[0]) == {"one"}


def test_an_answer_is_bounded() -> None:
    huge = b'{"keys": [' + b" " * MAX_JWKS_BYTES + b"]}"
    with web_server(answering(huge)) as address:
        assert "is larger than 1048576 bytes" in refusal(at(address))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    endless = [b"10000\r\n" + b"x" * 0x10000 + b"\r\n"] * 20
    with raw_server(head, *endless, hold=True) as address:
        assert "is larger than 1048576 bytes" in refusal(at(address))
    with raw_server(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, hold=True) as address:
        assert "is not HTTP" in refusal(at(address))
    with web_server(answering(b"x", Content_Encoding="gzip")) as address:
        assert "Content-Encoding" in refusal(at(address))


@pytest.mark.parametrize(
    ("status", "problem"),
    (
        (304, "was answered with status 304"),  # nobody has asked whether it changed
        (401, "check the credentials"),
        (404, "check the address"),
        (500, "was answered with status 500"),
    ),
)
def test_another_status_is_refused(status: int, problem: str) -> None:
    with web_server(answering(status=status)) as address:
        assert problem in refusal(at(address))


@pytest.mark.parametrize("status", (301, 302, 303, 307, 308))
def test_a_redirect_is_not_followed(status: int, idp: IdentityProvider, address: str) -> None:
    to = f"http://{address}/jwks.json"
    with web_server(answering(status=status, Location=to)) as elsewhere:
        assert "is elsewhere" in refusal(at(elsewhere))
        assert "is elsewhere" in refusal(DiscoveredJwks(f"http://{elsewhere}", ca_file=None))
    assert not idp.asked


def test_nobody_there_is_an_error() -> None:
    assert "can not be reached" in refusal(at("127.0.0.1:1"))
    with raw_server() as address:
        assert "hung up" in refusal(at(address))
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{") as address:
        assert "broke off" in refusal(at(address))


def test_an_etag_that_is_no_text_is_not_sent_back() -> None:
    asked: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.headers.get("If-None-Match"))
        return web.Response(body=jwks(public_jwk(ONE)), headers={"ETag": "x" * 2_000})

    with web_server(handle) as address:
        fetched(at(address), times=2)
    assert asked == [None, None]


def test_a_token_for_the_server_is_read_each_time(
    address: str, idp: IdentityProvider, tmp_path: Path
) -> None:
    file = tmp_path / "token"

    async def run() -> None:
        source = DiscoveredJwks(f"http://{address}", ca_file=None, bearer_token_file=file)
        for token in (SECRET, "another"):
            file.write_text(token + "\n")
            await source.fetch()
        await source.close()

    asyncio.run(run())
    sent = [headers["Authorization"] for headers in idp.headers]
    assert sent == [f"Bearer {SECRET}"] * 2 + ["Bearer another"] * 2
    file.unlink()
    assert "can not be read" in refusal(at(address, bearer_token_file=file))


def test_no_cookie_is_kept() -> None:
    sent: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        sent.append(request.headers.get("Cookie"))
        return web.Response(body=jwks(public_jwk(ONE)), headers={"Set-Cookie": "session=1; Path=/"})

    with web_server(handle) as address:
        fetched(at(address), times=2)
    assert sent == [None, None]


def test_neither_proxy_nor_netrc_of_the_environment_is_used(
    address: str, idp: IdentityProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert fetched(at(address))
    assert "Authorization" not in idp.headers[0]


def test_a_server_is_believed_by_its_authority_alone(idp: IdentityProvider, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    with web_server(idp.handle, tls=ours.server_context()) as address:
        issuer = f"https://{address}"
        assert set(fetched(DiscoveredJwks(issuer, ca_file=ours.file))[0]) == {"one"}
        assert set(fetched(JwksUrl(f"{issuer}/jwks.json", ca_file=ours.file))[0]) == {"one"}
        for ca_file in (theirs.file, None):
            for source in (
                DiscoveredJwks(issuer, ca_file=ca_file),
                JwksUrl(f"{issuer}/jwks.json", ca_file=ca_file),
            ):
                assert "certificate is not one to be trusted" in refusal(source)
        by_name = issuer.replace("127.0.0.1", "localhost")
        assert "certificate is not one to be trusted" in refusal(
            DiscoveredJwks(by_name, ca_file=ours.file)
        )


def test_an_issuer_says_where_its_keys_are(address: str, idp: IdentityProvider) -> None:
    for issuer in (f"http://{address}", f"http://{address}/", f"http://{address}/tenants/7"):
        idp.discovery["issuer"] = issuer
        idp.asked.clear()
        assert set(fetched(DiscoveredJwks(issuer, ca_file=None))[0]) == {"one"}
        document = issuer.removesuffix("/") + "/.well-known/openid-configuration"
        assert set(idp.asked) == {document.removeprefix(f"http://{address}"), "/jwks.json"}


def test_keys_that_have_moved_are_followed_within_the_origin(
    address: str, idp: IdentityProvider
) -> None:
    async def run() -> None:
        source = DiscoveredJwks(f"http://{address}", ca_file=None)
        assert set(await source.fetch()) == {"one"}
        idp.discovery["jwks_uri"] = f"http://{address}/jwks.json?version=2"
        idp.publish(TWO)
        assert set(await source.fetch()) == {"two"}
        await source.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "issuer",
    (None, "", 7, ["{}"], "https://attacker.example", "{}/", "{} ", "{}/tenants/7", "HTTP{}"),
)
def test_a_document_of_another_issuer_is_refused(
    issuer: Any, address: str, idp: IdentityProvider
) -> None:
    ours = f"http://{address}"
    idp.discovery["issuer"] = issuer.format(ours) if isinstance(issuer, str) else issuer
    assert "names another issuer" in refusal(DiscoveredJwks(ours, ca_file=None))
    assert "/jwks.json" not in idp.asked


@pytest.mark.parametrize(
    ("uri", "problem"),
    (
        (None, "names no jwks_uri"),
        (7, "names no jwks_uri"),
        ("", "another origin"),
        ("/jwks.json", "another origin"),
        ("//{host}/jwks.json", "another origin"),
        ("https://{host}/jwks.json", "another origin"),
        ("http://attacker.example/jwks.json", "another origin"),
        ("http://{host}@attacker.example/jwks.json", "another origin"),
        ("http://user:pw@{host}/jwks.json", "another origin"),
        ("http://{host}.attacker.example/jwks.json", "another origin"),
        ("http://127.0.0.1:1/jwks.json", "another origin"),
        ("http://127.0.0.1:99999999/jwks.json", "another origin"),
        ("http://[::1/jwks.json", "another origin"),
        ("http://localhost/jwks.json", "another origin"),
        ("file:///etc/passwd", "another origin"),
        ("unix:///run/agent.sock", "another origin"),
        ("http://{host}/" + "x" * 2_000, "names no jwks_uri"),
        ("http://{host}/\r\nX-Injected: 1", "names no jwks_uri"),
    ),
)
def test_keys_elsewhere_are_refused(
    uri: Any, problem: str, address: str, idp: IdentityProvider
) -> None:
    idp.discovery["jwks_uri"] = uri.format(host=address) if isinstance(uri, str) else uri
    assert problem in refusal(DiscoveredJwks(f"http://{address}", ca_file=None))
    assert "/jwks.json" not in idp.asked


def test_a_discovery_document_is_bounded() -> None:
    with web_server(answering(b'{"a": "' + b"x" * 300_000 + b'"}')) as address:
        assert "is larger than 262144 bytes" in refusal(
            DiscoveredJwks(f"http://{address}", ca_file=None)
        )


def test_a_file_is_taken_up_again_however_it_was_replaced(tmp_path: Path) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    for directory, issuer in ((first, ONE), (second, TWO), (third, ONE)):
        directory.mkdir()
        issuer.write_jwks(directory / "jwks.json")
    # As Kubernetes mounts it: a link to a directory that is swapped.
    link = tmp_path / "data"
    link.symlink_to(first)
    source = JwksFile(link / "jwks.json")
    kept = source.read()
    assert set(kept) == {"one"}
    assert source.read() is kept
    swapped = tmp_path / "swapped"
    swapped.symlink_to(second)
    swapped.replace(link)
    assert set(source.read()) == {"two"}
    (third / "jwks.json").replace(second / "jwks.json")
    assert set(source.read()) == {"one"}
    TWO.write_jwks(second / "jwks.json")
    assert set(source.read()) == {"two"}


def test_a_file_that_is_broken_or_gone_is_an_error_until_it_is_back(tmp_path: Path) -> None:
    file = ONE.write_jwks(tmp_path / "jwks.json")
    source = JwksFile(file)
    assert set(source.read()) == {"one"}
    content = file.read_text()
    file.write_text(content[:40])
    with pytest.raises(KeySourceError, match=r"jwks\.json is not JSON"):
        source.read()
    file.unlink()
    with pytest.raises(KeySourceError, match=r"jwks\.json can not be read: No such file"):
        source.read()
    file.mkdir()
    with pytest.raises(KeySourceError, match="can not be read: Is a directory"):
        source.read()
    file.rmdir()
    file.write_text(content)
    assert set(source.read()) == {"one"}


def test_a_file_without_a_key_is_a_mistake_at_first_and_later_takes_all_away(
    tmp_path: Path,
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text('{"keys": []}')
    source = JwksFile(file)
    with pytest.raises(KeySourceError, match="holds no signing key"):
        source.read_first()
    assert source.read() == {}


def test_keys_in_files_need_no_client_of_anything(tmp_path: Path) -> None:
    ONE.write_jwks(tmp_path / "jwks.json")
    program = """
import pathlib, sys
from pdp.config import IssuerKeys
from pdp.server.metrics import Metrics
from pdp.server.trusted_keys import TrustedKeys

settings = IssuerKeys(jwks_file=pathlib.Path(sys.argv[1]))
TrustedKeys(Metrics()).open(settings, "https://id.example")
print({"aiohttp", "pdp.api.spiffe.workload_pb2"} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "jwks.json")],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == "set()\n"
