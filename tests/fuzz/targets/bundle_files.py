"""The files of a bundle: manifest, data in JSON and YAML, Rego; and what their signature and a
delta make of them (pdp.policy).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Final, cast

import yaml
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from joserfc import jws as joserfc_jws
from joserfc.jwk import OKPKey

from pdp.canonical import JsonObject, JsonValue, canonical_bytes, check
from pdp.policy.bundle import assemble
from pdp.policy.data import is_data, parse_data
from pdp.policy.delta import apply_delta
from pdp.policy.engine import BundleError
from pdp.policy.manifest import REVISION
from pdp.policy.part import Part, read_part
from pdp.policy.roots import first_outside
from pdp.policy.signature import SIGNATURES, VerificationKey, Verifier, sign
from tests.fuzz import jose
from tests.fuzz.choices import ODD_VALUES, Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, refuses

PLACE: Final = "https://bundles.example/acme"
DATA: Final[JsonValue] = {
    "acme": {"status": "active", "scopes": ["read", "write"], "limit": 1.5, "a/b": {"~": 1}},
    "globex": {"note": SECRET},
}
MANIFEST: Final[JsonValue] = {
    "revision": "r-1",
    "roots": ["pdp", "tenants"],
    "rego_version": 1,
    "wasm": [{"entrypoint": "pdp/authz/decision", "module": "/policy.wasm"}],
    "metadata": {"pdp": {"sequence": 1}},
}
YAML: Final = (
    b"status: active\nroles: [a, 'b', \"c\"]\nlimit: 5\nmore:\n  - null\n  - text: |\n      x\n"
)
FILES: Final[Mapping[str, bytes]] = {
    "pdp/authz/authz.rego": b'# METADATA\npackage pdp.authz["x"]\n\ndecision := {"allow": false}\n',
    "pdp/budget/budget.rego": b"package pdp.budget\n\nlimits := []\n",
    "tenants/data.json": json.dumps(DATA).encode(),
    "tenants/initech/data.yaml": YAML,
    "policy.wasm": b"\0asm",
    "notes.txt": b"kept as they are",
    ".manifest": json.dumps(MANIFEST).encode(),
}
DELTA: Final[JsonValue] = {
    "data": [
        {"op": "upsert", "path": "/tenants/acme/scopes/-", "value": "pay"},
        {"op": "replace", "path": "/tenants/acme/a~1b/~0", "value": {"x": [1]}},
        {"op": "remove", "path": "/tenants/globex"},
    ]
}
DELTA_MANIFEST: Final[JsonValue] = {
    "revision": "r-2",
    "roots": ["pdp", "tenants"],
    "metadata": {"pdp": {"sequence": 2, "base": "r-1"}},
}
PEM: Final = jose.KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
SIGNER: Final = OKPKey.import_key(PEM)
VERIFIER: Final = Verifier(
    keys={
        "k-1": VerificationKey(
            pem=jose.KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            algorithm="EdDSA",
        )
    },
    scope="prod",
)


def _signed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    signature = sign(files, private_key_pem=PEM, key_id="k-1", algorithm="EdDSA", scope="prod")
    return {**files, SIGNATURES: signature}


SIGNED: Final = _signed(FILES)
CLAIMS: Final[JsonObject] = json.loads(
    json.dumps(jose.said(json.loads(SIGNED[SIGNATURES])["signatures"][0])[1])
)
BASE: Final = read_part(FILES, name="acme", place=PLACE, verifier=None)


def samples() -> Iterable[bytes]:
    yield b"\0\0"
    yield b"\0\1"
    yield b"\1"
    yield b"\2"
    yield b"\3"
    yield b"\3\0\0\0\1\0\3"
    yield b"\4" + YAML


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    match choices.number(5):
        case 0:
            return _whole(_changed(FILES, choices))
        case 1:
            return _on_the_way(_changed(SIGNED, choices))
        case 2:
            return _by_its_signer(choices)
        case 3:
            return _delta(choices)
        case _:
            return _data(choices.rest())


def _whole(files: Mapping[str, bytes]) -> bool:
    """A bundle that nobody has to have signed."""
    part = refuses(lambda: read_part(files, name="a", place=PLACE, verifier=None), BundleError)
    if part is None:
        return False
    _check_part(part)
    bundle = refuses(lambda: assemble([part]), BundleError)
    if bundle is None:
        return False
    assert json.loads(bundle.data) == part.data
    assert bundle.revision == part.manifest.revision
    return True


def _on_the_way(files: Mapping[str, bytes]) -> bool:
    """A signed bundle that somebody has changed."""
    part = refuses(lambda: read_part(files, name="a", place=PLACE, verifier=VERIFIER), BundleError)
    if part is None:
        return False
    assert files.keys() == SIGNED.keys()
    for name, content in FILES.items():
        if is_data(name) or name == ".manifest":
            assert parse_data(name, files[name], place=PLACE) == parse_data(
                name, content, place=PLACE
            ), "other content than was signed is taken"
        else:
            assert files[name] == content, "another file than was signed is taken"
    return True


def _by_its_signer(choices: Choices) -> bool:
    """Whatever a trusted signer writes into the signature, it covers every file as it is."""
    header: JsonValue = {"alg": "EdDSA", "kid": "k-1", "typ": "JWT"}
    if choices.yes():
        header = edited(header, choices)
    claims = edited(CLAIMS, choices)
    token = jose.compact(header, json.dumps(claims).encode("utf-8", "surrogatepass"))
    document: JsonValue = {"signatures": [token]}
    if choices.number(4) == 1:
        document = edited(document, choices)
    files = {**FILES, SIGNATURES: json.dumps(document).encode("utf-8", "surrogatepass")}

    def verified() -> bool:
        VERIFIER.verify(files, place=PLACE)
        return True

    if not refuses(verified, BundleError):
        return False
    said = jose.said(token)[1]
    listed = cast("list[dict[str, str]]", said["files"])
    assert {each["name"] for each in listed} == FILES.keys()
    assert said.get("scope") == "prod"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joserfc_jws.deserialize_compact(token, SIGNER, algorithms=["EdDSA"])
    return True


def _delta(choices: Choices) -> bool:
    patch, manifest = DELTA, DELTA_MANIFEST
    match choices.number(4):
        case 0:
            patch = _deep(choices)
        case 1:
            manifest = edited(DELTA_MANIFEST, choices)
        case _:
            patch = edited(DELTA, choices)
    files = {
        "patch.json": json.dumps(patch).encode("utf-8", "surrogatepass"),
        ".manifest": json.dumps(manifest).encode("utf-8", "surrogatepass"),
    }
    before = canonical_bytes(BASE.data)
    part = refuses(
        lambda: apply_delta(BASE, files, name="a", place=PLACE, verifier=None), BundleError
    )
    assert canonical_bytes(BASE.data) == before, "the bundle before was changed"
    if part is None:
        return False
    _check_part(part)
    assert part.manifest.roots == BASE.manifest.roots
    assert part.rego == BASE.rego
    assert part.wasm == BASE.wasm
    return True


def _deep(choices: Choices) -> JsonValue:
    """Operations with paths of many steps."""
    operations: list[JsonValue] = []
    for _ in range(choices.number(3)):
        kind = choices.pick(["upsert", "replace", "remove"])
        path = "/tenants/" + "/".join(
            [choices.pick(["a", "0", "~1", "%2f"])] * choices.number(2**12)
        )
        operations.append({"op": kind, "path": path, "value": choices.pick(ODD_VALUES)})
    return {"data": operations} if operations else DELTA


def _data(content: bytes) -> bool:
    """What is read of YAML is what others read of it."""
    value = refuses(lambda: [parse_data("data.yaml", content, place=PLACE)], BundleError)
    if value is None:
        return False
    check(value[0])
    try:
        other = yaml.load(content, Loader=_Plain)  # noqa: S506 - it makes texts and nothing else
    except (yaml.YAMLError, ValueError):
        return True  # JSON that is no YAML
    assert _texts(other) == _texts(value[0])
    return True


class _Plain(yaml.CBaseLoader):
    """Takes every scalar for a text."""


def _texts(value: object) -> object:
    """Only the form of it, and its keys."""
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return None


def _check_part(part: Part) -> None:
    check(part.data)
    assert REVISION.fullmatch(part.manifest.revision)
    assert first_outside(part.manifest.roots, part.data, ()) is None
    assert SECRET not in repr(part)


def _changed(files: Mapping[str, bytes], choices: Choices) -> dict[str, bytes]:
    """Some files otherwise: in their text or as JSON, under another name, or not at all."""
    changed = dict(files)
    for _ in range(4):
        if not choices.are_left or not changed:
            break
        name = choices.pick(sorted(changed))
        match choices.number(6):
            case 0:
                changed[name] = edited_bytes(changed[name], choices)
            case 1 if name.endswith((".json", ".manifest")):
                value = edited(_read(changed[name]), choices)
                changed[name] = json.dumps(value).encode("utf-8", "surrogatepass")
            case 2:
                changed[f"{choices.text()[:40]}/{name}"] = changed.pop(name)
            case 3:
                del changed[name]
            case 4:
                changed[choices.pick(["data.json", "a/data.yml", "a.rego", "x/.manifest"])] = (
                    choices.some()
                )
            case _:
                changed[name] = json.dumps(choices.pick(ODD_VALUES)).encode()
    return changed


def _read(content: bytes) -> JsonValue:
    try:
        return cast("JsonValue", json.loads(content))
    except (ValueError, RecursionError):
        return {}
