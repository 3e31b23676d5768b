from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdp.config import OciSource
from pdp.policy.archive import MAX_ARCHIVE_BYTES
from pdp.policy.sources.oci import Image, OciBundleSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import LAYER, Registry, archive, digest_of, fetched, web_server

INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def address(registry: Registry) -> Iterator[str]:
    with web_server(registry.handle) as address:
        yield address


@pytest.fixture
def credentials(tmp_path: Path) -> dict[str, Any]:
    files = {"username_file": tmp_path / "user", "password_file": tmp_path / "password"}
    files["username_file"].write_text("ann\n")
    files["password_file"].write_text("s3cret\n")
    return files


def source(address: str, reference: str = ":1.2", **settings: Any) -> OciBundleSource:
    image = f"{address}/policies/acme{reference}"
    return OciBundleSource(OciSource(image=image, plain_http=True, **settings))


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
    registry: Registry, address: str
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
    assert sum("/blobs/" in path for path in registry.asked) == 2


def test_a_digest_is_fetched_once(registry: Registry, address: str) -> None:
    digest = registry.push("1.2", archive(1))
    fixed = source(address, f"@{digest}")
    first, same = fetched(fixed, None, digest)
    assert first is not None
    assert (first.tag, same) == (digest, None)
    assert len(registry.asked) == 2


def test_an_index_of_one_manifest_is_followed(registry: Registry, address: str) -> None:
    digest = registry.push("inner", archive(1))
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1}
    outer = registry.put_manifest("1.2", {"mediaType": INDEX, "manifests": [entry]})
    (found,) = fetched(source(address), None)
    assert found is not None
    assert found.tag == outer
    registry.put_manifest("1.2", {"mediaType": INDEX, "manifests": [entry, entry]})
    assert "other than one manifest" in refusal(address)


def test_a_token_is_fetched_where_the_registry_says_and_used_again(
    registry: Registry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "token"
    registry.push("1.2", archive(1))
    (found,) = fetched(source(address, **credentials), None)
    assert found is not None
    assert registry.tokens_given == 1
    (anonymous,) = fetched(source(address), None)
    assert anonymous is not None


def test_a_wrong_password_is_an_error_that_says_so(
    registry: Registry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "token"
    registry.push("1.2", archive(1))
    credentials["password_file"].write_text("s3cret-but-wrong")
    assert "check the credentials" in refusal(address, **credentials)


def test_basic_credentials_are_given_only_when_asked_for(
    registry: Registry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "basic"
    registry.push("1.2", archive(1))
    (found,) = fetched(source(address, **credentials), None)
    assert found is not None
    assert "check the credentials" in refusal(address)


@pytest.mark.parametrize(
    "realm", ("http://192.0.2.1/token", "http://user@127.0.0.1/token", "file:///etc/passwd", "")
)
def test_credentials_go_to_no_address_in_plain_text(
    registry: Registry, address: str, credentials: dict[str, Any], realm: str
) -> None:
    registry.auth = "token"
    registry.realm = realm or "nowhere"
    registry.push("1.2", archive(1))
    assert "at an address that is not https" in refusal(address, **credentials)


def test_a_blob_elsewhere_is_fetched_without_credentials(
    registry: Registry, address: str, credentials: dict[str, Any]
) -> None:
    registry.auth = "token"
    registry.redirect_to = "http://{host}{path}?stored=1"
    registry.push("1.2", archive(1))
    (found,) = fetched(source(address, **credentials), None)
    assert found is not None


@pytest.mark.parametrize("to", ("http://192.0.2.1/x", "ftp://x/y", "//u@127.0.0.1/z"))
def test_a_blob_is_fetched_from_no_address_in_plain_text(
    registry: Registry, address: str, to: str
) -> None:
    registry.redirect_to = to
    registry.push("1.2", archive(1))
    assert "redirected to an address that is not https" in refusal(address)


def test_a_blob_is_not_chased_through_many_redirects(registry: Registry, address: str) -> None:
    registry.redirect_to = "http://{host}{path}"
    registry.push("1.2", archive(1))
    assert "307" in refusal(address)


def test_what_is_not_what_its_digest_says_is_refused(registry: Registry, address: str) -> None:
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
    registry: Registry, address: str, layers: Any, said: str
) -> None:
    registry.push("1.2", archive(1), layers=layers)
    assert said in refusal(address)


@pytest.mark.parametrize("body", (b"", b"[]", b"{", b"[" * 100_000))
def test_a_manifest_that_is_no_object_is_refused(
    registry: Registry, address: str, body: bytes
) -> None:
    registry.manifests["1.2"] = ("", body)
    assert "has a manifest that is not JSON" in refusal(address)


def test_an_image_that_is_not_there_is_an_error(address: str) -> None:
    assert "is not there (404)" in refusal(address)
