from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdp.config import BundleSettings, OciSource
from pdp.policy.archive import MAX_ARCHIVE_BYTES
from pdp.policy.engine import BundleError
from pdp.policy.sources import open_source
from pdp.policy.sources.oci import Image, OciBundleSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import (
    LAYER,
    Authority,
    FakeRegistry,
    answering,
    archive,
    digest_of,
    fetched,
    web_server,
)

INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def address(registry: FakeRegistry) -> Iterator[str]:
    with web_server(registry.handle) as address:
        yield address


@pytest.fixture
def credentials(tmp_path: Path) -> dict[str, Any]:
    files = {"username_file": tmp_path / "user", "password_file": tmp_path / "password"}
    files["username_file"].write_text("ann\n")
    files["password_file"].write_text("s3cret\n")
    return files


def source(
    address: str,
    reference: str = ":1.2",
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> OciBundleSource:
    image = f"{address}/policies/acme{reference}"
    return OciBundleSource(OciSource(image=image, plain_http=True, **settings), clock=clock)


def refusal(address: str, reference: str = ":1.2", **settings: Any) -> str:
    with pytest.raises(SourceError) as refused:
        fetched(source(address, reference, **settings), None)
    assert "s3cret" not in refused.value.message
    return refused.value.message


@pytest.mark.parametrize(
    ("text", "image"),
    (
        ("r.example/a/b:1.2", ("r.example", "a/b", "1.2")),
        ("r.example:5000/a", ("r.example:5000", "a", "latest")),
        (f"r.example/a:1@{digest_of(b'')}", ("r.example", "a", digest_of(b""))),
    ),
)
def test_a_reference_is_read_as_registries_read_it(text: str, image: tuple[str, ...]) -> None:
    parsed = Image.parse(text)
    assert (parsed.registry, parsed.repository, parsed.reference) == image


def test_a_tag_is_looked_at_and_its_layer_fetched_when_it_moves(
    registry: FakeRegistry, address: str
) -> None:
    first_digest = registry.push("1.2", archive(1))
    watched = source(address)
    first, same = fetched(watched, None, first_digest)
    assert first is not None
    assert (first.files, first.tag) == ({"data.json": b'{"number": 1}'}, first_digest)
    assert same is None
    registry.push("1.2", archive(2))
    (second,) = fetched(watched, first_digest)
    assert second is not None
    assert second.files == {"data.json": b'{"number": 2}'}
    assert [asked.split("/")[0] + asked.split("/")[4] for asked in registry.asked] == [
        "GET manifests", "GET blobs", "HEAD manifests",
        "HEAD manifests", "GET manifests", "GET blobs",
    ]  # fmt: skip


def test_a_registry_that_names_no_digest_is_asked_for_the_manifest(
    registry: FakeRegistry, address: str
) -> None:
    registry.names_digests = False
    digest = registry.push("1.2", archive(1))
    assert fetched(source(address), digest) == [None]
    assert not any("/blobs/" in asked for asked in registry.asked)


def test_a_digest_is_fetched_once(registry: FakeRegistry, address: str) -> None:
    digest = registry.push("1.2", archive(1))
    fixed = source(address, f"@{digest}")
    first, same = fetched(fixed, None, digest)
    assert first is not None
    assert (first.tag, same) == (digest, None)
    assert len(registry.asked) == 2


def test_an_index_of_one_manifest_is_followed(registry: FakeRegistry, address: str) -> None:
    digest = registry.push("inner", archive(1))
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1}
    outer = registry.put_manifest("1.2", {"mediaType": INDEX, "manifests": [entry]})
    (found,) = fetched(source(address), None)
    assert found is not None
    assert found.tag == outer
    provenance = {**entry, "platform": {"os": "unknown", "architecture": "unknown"}}
    registry.put_manifest("1.2", {"mediaType": INDEX, "manifests": [entry, provenance]})
    assert fetched(source(address), None) != [None]


@pytest.mark.parametrize("count", (0, 2))
def test_an_index_of_other_than_one_manifest_is_refused(
    registry: FakeRegistry, address: str, count: int
) -> None:
    digest = registry.push("inner", archive(1))
    registry.put_manifest("1.2", {"mediaType": INDEX, "manifests": [{"digest": digest}] * count})
    assert "is an index of other than one manifest" in refusal(address)


def test_a_manifest_that_two_readers_could_read_apart_is_refused(
    registry: FakeRegistry, address: str
) -> None:
    registry.push("1.2", archive(1), manifests=[])
    assert "has a manifest that is an index too" in refusal(address)


def test_an_index_within_an_index_is_refused(registry: FakeRegistry, address: str) -> None:
    digest = registry.push("inner", archive(1))
    for tag in ("middle", "1.2"):
        entry = {"mediaType": INDEX, "digest": digest, "size": 1}
        digest = registry.put_manifest(tag, {"mediaType": INDEX, "manifests": [entry]})
    assert "has no layer" in refusal(address)


def test_the_layer_that_oras_writes_unless_told_better_is_taken(
    registry: FakeRegistry, address: str
) -> None:
    kind = "application/vnd.oci.image.layer.v1.tar"
    layer = {"mediaType": kind, "digest": digest_of(archive(1)), "size": len(archive(1))}
    registry.push("1.2", archive(1), layers=[{"mediaType": "text/plain"}, layer])
    (found,) = fetched(source(address), None)
    assert found is not None
    assert found.files == {"data.json": b'{"number": 1}'}


def test_a_layer_that_is_no_bundle_is_refused(registry: FakeRegistry, address: str) -> None:
    registry.push("1.2", b"no bundle")
    with pytest.raises(BundleError, match=r"acme:1\.2 is not a whole \.tar\.gz"):
        fetched(source(address), None)


def test_a_digest_that_is_in_force_is_not_asked_for() -> None:
    digest = digest_of(b"")
    assert fetched(source("127.0.0.1:1", f"@{digest}"), digest) == [None]


def test_a_token_is_fetched_where_the_registry_says_and_used_again(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "token"
    registry.push("1.2", archive(1))
    (found,) = fetched(source(address, **credentials), None)
    assert found is not None
    assert registry.tokens_given == 1
    assert registry.asked.count("GET /token") == 1
    (anonymous,) = fetched(source(address), None)
    assert anonymous is not None


def test_a_token_is_fetched_anew_when_it_ends_or_is_refused(
    registry: FakeRegistry, address: str
) -> None:
    registry.auth = "token"
    digest = registry.push("1.2", archive(1))
    now = [0.0]
    watched = source(address, clock=lambda: now[0])
    assert fetched(watched, None) != [None]
    now[0] = 0.8 * 300
    assert fetched(watched, digest) == [None]
    assert registry.tokens_given == 1
    now[0] = 0.95 * 300
    registry.asked.clear()
    assert fetched(watched, digest) == [None]
    assert registry.tokens_given == 2
    registry.tokens_given += 1  # as a registry that was restarted
    assert fetched(watched, digest) == [None]
    assert registry.tokens_given == 4


@pytest.mark.parametrize(
    "answer",
    (
        [], "x", {}, {"token": ""}, {"token": 7}, {"token": "a\nb"}, {"token": "\u00e4"},
        {"token": "x", "expires_in": "soon"}, {"token": "x", "expires_in": [1]}, {"token": [1]},
        {"token": "x", "expires_in": 10**400},
    ),
)  # fmt: skip
def test_a_token_that_can_not_be_read_is_an_error(
    registry: FakeRegistry, address: str, answer: Any
) -> None:
    registry.auth = "token"
    registry.token_answer = answer
    registry.push("1.2", archive(1))
    assert "whose token can not be read" in refusal(address)


@pytest.mark.parametrize("seconds", (-5, "NaN", None, 0))
def test_a_token_that_has_ended_already_is_used_once(
    registry: FakeRegistry, address: str, seconds: Any
) -> None:
    registry.auth, registry.tokens_given = "token", 1
    registry.token_answer = {"access_token": "token-1", "expires_in": seconds}
    registry.push("1.2", archive(1))
    assert fetched(source(address), None) != [None]


def test_a_token_is_chosen_where_a_password_would_do_too(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "both"
    registry.push("1.2", archive(1))
    assert fetched(source(address, **credentials), None) != [None]
    assert registry.tokens_given == 1


def test_a_password_that_is_changed_is_read_anew(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "basic"
    digest = registry.push("1.2", archive(1))
    watched = source(address, **credentials)
    assert fetched(watched, None) != [None]
    assert len(registry.asked) == 3  # the first request was without
    credentials["password_file"].write_text("old")
    with pytest.raises(SourceError, match="check the credentials"):
        fetched(watched, digest)
    credentials["password_file"].write_text("s3cret")
    assert fetched(watched, digest) == [None]


def test_a_pause_that_a_registry_asks_for_is_kept() -> None:
    async def run(address: str) -> None:
        watched = source(address, poll_seconds=1)
        with pytest.raises(SourceError, match="raise poll_seconds"):
            await watched.fetch(None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watched.wait(), 1.3)
        await watched.close()

    with web_server(answering(status=429, Retry_After="30")) as address:
        asyncio.run(run(address))


def test_a_wrong_password_is_an_error_that_says_so(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "token"
    registry.push("1.2", archive(1))
    credentials["password_file"].write_text("s3cret-but-wrong")
    assert "check the credentials" in refusal(address, **credentials)


def test_basic_credentials_are_given_only_when_asked_for(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "basic"
    registry.push("1.2", archive(1))
    (found,) = fetched(source(address, **credentials), None)
    assert found is not None
    assert "check the credentials" in refusal(address)


@pytest.mark.parametrize(
    "realm",
    (
        "http://192.0.2.1/token",
        "http://user@127.0.0.1/token",
        "file:///etc/passwd",
        "http://[",
        "http://127.0.0.1/#",
        "",
    ),
)
def test_credentials_go_to_no_address_in_plain_text(
    registry: FakeRegistry, address: str, credentials: dict[str, Any], realm: str
) -> None:
    registry.auth = "token"
    registry.realm = realm or "nowhere"
    registry.push("1.2", archive(1))
    assert "at an address that is not https" in refusal(address, **credentials)


def test_a_registry_of_https_names_no_plain_address_of_this_machine(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    """Whoever else listens here may not be given a token, or a say in what the blob is."""
    authority = Authority(tmp_path / "ca", "ca")
    registry.push("1.2", archive(1))
    with (
        web_server(registry.handle) as here,
        web_server(registry.handle, tls=authority.server_context()) as address,
    ):
        settings = OciSource(image=f"{address}/policies/acme:1.2", ca_file=authority.file)
        (found,) = fetched(OciBundleSource(settings), None)
        assert found is not None
        registry.redirect_to = f"http://{here}/"
        with pytest.raises(SourceError, match="redirected to an address that is not https"):
            fetched(OciBundleSource(settings), None)
        registry.auth, registry.realm = "token", f"http://{here}/token"
        with pytest.raises(SourceError, match="a token at an address that is not https"):
            fetched(OciBundleSource(settings), None)


def test_a_registry_may_come_to_want_other_credentials(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    digest = registry.push("1.2", archive(1))
    watched = source(address, **credentials)
    for registry.auth in ("basic", "token", "basic", "none"):
        assert fetched(watched, digest) == [None]
        registry.asked.clear()
        assert fetched(watched, digest) == [None]
        assert len(registry.asked) == 1


def test_a_blob_elsewhere_is_fetched_without_credentials(
    registry: FakeRegistry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "token"
    registry.redirect_to = "http://{host}{path}?stored=1"
    registry.push("1.2", archive(1))
    (found,) = fetched(source(address, **credentials), None)
    assert found is not None


@pytest.mark.parametrize("to", ("http://192.0.2.1/x", "ftp://x/y", "//u@127.0.0.1/z", "http://["))
def test_a_blob_is_fetched_from_no_address_in_plain_text(
    registry: FakeRegistry, address: str, to: str
) -> None:
    registry.redirect_to = to
    registry.push("1.2", archive(1))
    assert "redirected to an address that is not https" in refusal(address)


def test_a_blob_is_not_chased_through_many_redirects(registry: FakeRegistry, address: str) -> None:
    registry.redirect_to = "http://{host}{path}"
    registry.push("1.2", archive(1))
    assert "is redirected more than once" in refusal(address)


def test_what_is_not_what_its_digest_says_is_refused(registry: FakeRegistry, address: str) -> None:
    registry.push("1.2", archive(1))
    registry.blobs[digest_of(archive(1))] = archive(1)[:-1] + b"x"
    assert "has a layer that is not what its digest says" in refusal(address)
    digest = registry.push("1.3", archive(2))
    registry.manifests[digest] = registry.manifests["1.2"]
    assert "has a manifest that is not what its digest says" in refusal(address, f"@{digest}")


@pytest.mark.parametrize(
    ("layers", "said"),
    (
        ([], "has no layer of type"),
        ("x", "has no layer of type"),
        ([{"mediaType": "text/plain", "digest": digest_of(b""), "size": 0}], "no layer of type"),
        ([{"mediaType": LAYER, "digest": "sha512:1", "size": 1}], "without a sha256 digest"),
        ([{"mediaType": LAYER, "digest": "sha256:../../x", "size": 1}], "without a sha256 digest"),
        ([{"mediaType": LAYER, "digest": digest_of(b""), "size": -1}], "without a size"),
        ([{"mediaType": LAYER, "digest": digest_of(b""), "size": True}], "without a size"),
        (
            [{"mediaType": LAYER, "digest": digest_of(b""), "size": MAX_ARCHIVE_BYTES + 1}],
            f"is larger than {MAX_ARCHIVE_BYTES} bytes",
        ),
        ([{"mediaType": LAYER, "digest": digest_of(archive(1)), "size": 3}], "larger than 3 bytes"),
    ),
)
def test_a_hostile_manifest_is_refused(
    registry: FakeRegistry, address: str, layers: Any, said: str
) -> None:
    registry.push("1.2", archive(1), layers=layers)
    assert said in refusal(address)


@pytest.mark.parametrize("body", (b"", b"[]", b"{", b"[" * 100_000))
def test_a_manifest_that_is_no_object_is_refused(
    registry: FakeRegistry, address: str, body: bytes
) -> None:
    registry.manifests["1.2"] = ("", body)
    assert "has a manifest that is not a JSON object" in refusal(address)


def test_an_image_that_is_not_there_is_an_error(address: str) -> None:
    assert "is not there: check the address (status 404)" in refusal(address)


def test_a_manifest_is_followed_nowhere_else(address: str) -> None:
    async def handle(_request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": f"http://{address}/"})

    with web_server(handle) as redirecting:
        assert "is elsewhere" in refusal(redirecting)


def test_the_configuration_opens_a_registry() -> None:
    opened = open_source(BundleSettings(oci=OciSource(image="docker.io/acme/policies:1")))
    assert isinstance(opened, OciBundleSource)
    assert opened.place == "docker.io/acme/policies:1"
