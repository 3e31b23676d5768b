"""A delta bundle makes of a bundle what OPA would have made of it, or is refused."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pdp.canonical import JsonObject, JsonValue
from pdp.policy import delta as delta_module
from pdp.policy.archive import Files, pack
from pdp.policy.bundle import Part, read_part
from pdp.policy.delta import apply_delta
from pdp.policy.engine import BundleError
from pdp.policy.signature import SIGNATURES, VerificationKey, Verifier, sign
from tests.policy.bundles import REGO, WASM, manifest, message_of
from tests.policy.opa.servers import served

PLACE = "https://bundles.example/acme"
ROOTS = ["pdp", "tenants"]
DATA: JsonObject = {
    "acme": {"status": "active", "scopes": ["read", "write"], "a/b": {"~": 1}},
    "globex": {"status": "active"},
}
BASE_FILES = {
    **REGO,
    "policy.wasm": WASM,
    "notes.txt": b"kept as they are",
    "tenants/data.json": json.dumps(DATA).encode(),
    ".manifest": manifest(
        revision="r-1", roots=ROOTS, rego_version=1, metadata={"pdp": {"sequence": 1}}
    ),
}
BASE = read_part(BASE_FILES, name="acme", place=PLACE, verifier=None)


def operation(op: str, path: str, *value: JsonValue) -> JsonObject:
    return {"op": op, "path": path} | ({"value": value[0]} if value else {})


def delta(*operations: JsonObject, **members: object) -> dict[str, bytes]:
    said = {"revision": "r-2", "roots": ROOTS, "metadata": {"pdp": {"sequence": 2}}} | members
    return {
        "patch.json": json.dumps({"data": operations}).encode(),
        ".manifest": manifest(**said),
    }


def applied(files: Files, base: Part = BASE) -> Part:
    return apply_delta(base, files, name="acme", place=PLACE, verifier=None)


def refusal_of(files: Files, base: Part = BASE) -> str:
    with pytest.raises(BundleError) as refusal:
        applied(files, base)
    message = message_of(refusal)
    assert message.startswith(f"The policy bundle {PLACE} ")
    assert message.isprintable()
    return message.removeprefix(f"The policy bundle {PLACE} ")


CHANGES: tuple[JsonObject, ...] = (
    operation("upsert", "/tenants/initech", {"status": "active"}),
    operation("upsert", "tenants/acme/limits/daily", 5),
    operation("upsert", "/tenants/acme/scopes/-", "last"),
    operation("upsert", "/tenants/acme/scopes/3", "later"),
    operation("upsert", "/tenants/acme/scopes/1", "inserted"),
    operation("replace", "/tenants/acme/scopes/0", "first"),
    operation("remove", "/tenants/acme/scopes/2"),
    operation("replace", "/tenants/acme/status", "suspended"),
    operation("upsert", "/tenants/acme/a~1b/~0", 2),
    operation("upsert", "/tenants/%61cme/new%20name", None),
    {"op": "remove", "path": "/tenants/globex/", "value": None},
)
CHANGED = {
    "acme": {
        "status": "suspended",
        "scopes": ["first", "inserted", "last", "later"],
        "limits": {"daily": 5},
        "a/b": {"~": 2},
        "new name": None,
    },
    "initech": {"status": "active"},
}


def test_a_delta_makes_what_a_whole_bundle_would_hold() -> None:
    part = applied(delta(*CHANGES))

    assert part.data == {"tenants": CHANGED}
    assert (part.manifest.revision, part.manifest.sequence) == ("r-2", 2)
    assert part.manifest.roots == ("pdp", "tenants")
    assert (part.rego, part.wasm) == (BASE.rego, WASM)
    again = read_part(part.files, name="acme", place=PLACE, verifier=None)
    assert again == part
    assert part.files.keys() == BASE_FILES.keys() - {"tenants/data.json"} | {"data.json"}


def test_the_bundle_before_is_left_as_it_was() -> None:
    applied(delta(*CHANGES))

    assert BASE.data == {"tenants": DATA}
    assert BASE.files == BASE_FILES


def test_deltas_follow_each_other() -> None:
    first = applied(delta(operation("upsert", "/tenants/x", {})))
    second = applied(delta(operation("upsert", "/tenants/x/y", 1), revision="r-3"), first)

    assert second.data == {"tenants": {**DATA, "x": {"y": 1}}}
    assert second.manifest.revision == "r-3"


def test_a_delta_that_names_no_revision_gets_one_of_the_content() -> None:
    def revision(value: int) -> str:
        return applied(
            delta(operation("upsert", "/tenants/x", value), revision="", metadata={})
        ).manifest.revision

    assert revision(1).startswith("sha256:")
    assert revision(1) == revision(1) != revision(2)


@pytest.mark.parametrize(
    "change",
    (
        operation("replace", "/tenants/nobody", {}),
        operation("remove", "/tenants/nobody"),
        operation("remove", "/tenants/nobody/status"),
        operation("replace", "/tenants/nobody/status", 1),
        operation("upsert", "/tenants/acme/status/x", 1),
        operation("upsert", "/tenants/acme/scopes/x", 1),
        operation("upsert", "/tenants/acme/scopes/3", 1),
        operation("upsert", "/tenants/acme/scopes/01", 1),
        operation("upsert", "/tenants/acme/scopes/-1", 1),
        operation("upsert", "/tenants/acme/scopes/9/x", 1),
        operation("upsert", "/tenants/acme/scopes/" + "9" * 5000, 1),
        operation("replace", "/tenants/acme/scopes/-", 1),
        operation("replace", "/tenants/acme/scopes/2", 1),
        operation("remove", "/tenants/acme/scopes/2"),
        operation("remove", "/tenants/acme/status/x"),
    ),
    ids=lambda change: f"{change['op']}-{change['path'][:30]}",
)
def test_an_operation_that_does_not_fit_the_data_is_refused(change: JsonObject) -> None:
    sound = operation("upsert", "/tenants/x", 1)

    message = refusal_of(delta(sound, change))

    assert message.startswith(f"has operation 2 in patch.json, {change['op']} ")
    assert message.endswith(" that does not fit the data it is for.")


@pytest.mark.parametrize("path", ("/tools", "/tenant", "/system/x", "tenants%2Facme", "/~0tenants"))
def test_an_operation_outside_of_the_roots_is_refused(path: str) -> None:
    assert refusal_of(delta(operation("upsert", path, {}))) == (
        "has operation 1 in patch.json outside of the roots in .manifest."
    )


@pytest.mark.parametrize(
    "change",
    (
        operation("add", "/tenants/x", 1),
        operation("move", "/tenants/x", 1),
        operation("upsert", "/tenants/x"),
        operation("replace", "/tenants/acme"),
        operation("remove", "/tenants/acme", 1),
        operation("upsert", "", {}),
        operation("replace", "//", {}),
        operation("upsert", "/tenants/%zz", 1),
        operation("upsert", "/tenants/%ff", 1),
        {**operation("upsert", "/tenants/x", 1), "from": "/tenants/acme"},
        {"op": "upsert", "value": 1},
        {"path": "/tenants/x", "value": 1},
        {"op": [], "path": "/tenants/x", "value": 1},
    ),
    ids=str,
)
def test_an_operation_that_is_not_known_is_refused(change: JsonObject) -> None:
    assert "has operation 1 in patch.json that is not upsert, replace or remove" in refusal_of(
        delta(change)
    )


@pytest.mark.parametrize(
    ("patch", "complaint"),
    (
        (b"[]", "has a patch.json that must be a JSON object."),
        (b"{}", "has a patch.json that is not"),
        (b'{"data":[]}', "has a patch.json that is not"),
        (b'{"data":{}}', "has a patch.json that is not"),
        (b'{"data":[1],"policy":[]}', "has a patch.json that is not"),
        (b'{"data":[1]}', "has operation 1 in patch.json that is not upsert"),
        (b'{"data":[1],"data":[2]}', "duplicate key"),
    ),
)
def test_what_is_no_patch_is_refused(patch: bytes, complaint: str) -> None:
    assert complaint in refusal_of({**delta(), "patch.json": patch})


def test_more_operations_than_a_delta_may_have_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delta_module, "MAX_OPERATIONS", 2)

    assert refusal_of(delta(*3 * [operation("upsert", "/tenants/x", 1)])) == (
        "has more than 2 operations in patch.json."
    )


def test_a_delta_without_a_patch_is_refused() -> None:
    assert refusal_of({".manifest": b'{"roots":["pdp","tenants"]}'}) == (
        "is a delta bundle without patch.json."
    )


@pytest.mark.parametrize(
    "name", ("data.json", "x.rego", "policy.wasm", "notes.txt", "a/patch.json")
)
def test_a_delta_that_holds_anything_else_is_refused(name: str) -> None:
    files = delta(operation("upsert", "/tenants/x", 1))

    assert refusal_of({**files, name: b"{}"}) == (
        f"is a delta bundle that holds {name} beside its patch.json."
    )


@pytest.mark.parametrize("roots", (None, ["pdp"], ["pdp", "tenants", "tools"], [""]))
def test_a_delta_with_other_roots_is_refused(roots: list[str] | None) -> None:
    assert refusal_of(delta(operation("upsert", "/tenants/x", 1), roots=roots)) == (
        "is a delta bundle with other roots in .manifest than its base."
    )


def test_a_delta_for_another_module_is_refused() -> None:
    change = operation("upsert", "/tenants/x", 1)
    resolvers = [{"entrypoint": "pdp/authz/decision", "module": "/policy.wasm"}]

    assert refusal_of(delta(change, wasm=resolvers)) == (
        'is a delta bundle with another "wasm" in .manifest than its base.'
    )


@pytest.mark.parametrize("steps", (64, 70, 3_000))
def test_a_delta_that_nests_too_deep_is_refused(steps: int) -> None:
    assert "nested more than 64 deep" in refusal_of(
        delta(operation("upsert", "/tenants" + "/x" * steps, 1))
    )


@pytest.mark.parametrize("base", ("r-0", 1, ["r-1"]))
def test_a_delta_for_another_revision_is_refused(base: JsonValue) -> None:
    files = delta(operation("remove", "/tenants/acme"), metadata={"pdp": {"base": base}})

    assert refusal_of(files) == (
        "is a delta bundle for another revision (metadata.pdp.base in .manifest) than r-1."
    )


def test_a_delta_must_be_signed_like_any_bundle() -> None:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    verifier = Verifier(
        keys={"release": VerificationKey(pem=public, algorithm="EdDSA")}, scope="prod"
    )

    def signed_one(*, base: str | None) -> Files:
        plain = delta(
            operation("upsert", "/tenants/x", 1), metadata={"pdp": {"sequence": 2, "base": base}}
        )
        text = sign(
            plain, private_key_pem=private, key_id="release", algorithm="EdDSA", scope="prod"
        )
        return {**plain, SIGNATURES: text}

    signed = signed_one(base="r-1")

    def taken(files: Files) -> Part:
        return apply_delta(BASE, files, name="acme", place=PLACE, verifier=verifier)

    assert taken(signed).data == {"tenants": {**DATA, "x": 1}}
    assert SIGNATURES not in taken(signed).files
    with pytest.raises(BundleError, match="is not signed"):
        taken({name: signed[name] for name in signed if name != SIGNATURES})
    # Who hands it out may not leave out the one before, nor lay it upon any other.
    with pytest.raises(BundleError, match=r"for another revision \(metadata\.pdp\.base"):
        taken(signed_one(base="r-0"))
    with pytest.raises(BundleError, match="does not say which revision it is for"):
        taken(signed_one(base=None))
    other = delta(operation("upsert", "/tenants/x", 2))
    with pytest.raises(BundleError, match=r"holds another patch\.json than was signed"):
        taken({**signed, "patch.json": other["patch.json"]})


# As OPA does it


def test_a_real_opa_makes_the_same_of_it(opa: Path, tmp_path: Path) -> None:
    base = {name: content for name, content in BASE_FILES.items() if name != "policy.wasm"}
    change = delta(*CHANGES, rego_version=1)

    with (
        bundle_server([pack(base), pack(change)]) as url,
        served(opa, "--config-file", polling(url, tmp_path)) as api,
    ):
        made = wait_for_revision(api, "r-2")

    assert made["tenants"] == CHANGED


@contextmanager
def bundle_server(bundles: list[bytes]) -> Iterator[str]:
    """Gives one bundle after the other, and then nothing new."""
    left = list(enumerate(bundles))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not left:
                self.send_response(304)
                self.end_headers()
                return
            number, content = left.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{number}"')
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def polling(url: str, folder: Path) -> Path:
    config = folder / "config.json"
    bundle = {
        "service": "bundles",
        "resource": "bundle.tar.gz",
        "polling": {"min_delay_seconds": 0, "max_delay_seconds": 1},
    }
    config.write_text(
        json.dumps({"services": {"bundles": {"url": url}}, "bundles": {"acme": bundle}})
    )
    return config


def wait_for_revision(api: str, revision: str) -> JsonObject:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with urllib.request.urlopen(f"{api}/v1/data?provenance=true") as answer:  # noqa: S310 - loopback
            said = json.load(answer)
        if said["provenance"]["bundles"]["acme"]["revision"] == revision:
            data: JsonObject = said["result"]
            return data
        time.sleep(0.02)
    raise AssertionError(f"opa did not take {revision}")
