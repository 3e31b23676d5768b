"""Compile Rego with the opa command, and build bundles that carry what it compiled."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pdp.canonical import JsonError, JsonObject, JsonValue, canonical_bytes, parse_object
from pdp.policy.archive import MAX_ARCHIVE_BYTES, Files, read_archive
from pdp.policy.engine import REQUIRED_ENTRYPOINTS, BundleError, Entrypoint
from pdp.policy.manifest import MANIFEST, REGO_VERSION, WASM, manifest_document
from pdp.policy.part import is_test, package_of, read_part
from pdp.policy.roots import leads_to, segments
from pdp.policy.signature import SIGNATURES
from pdp.policy.syntax import rule_paths
from pdp.reason import ReasonCode

COMPILE_TIMEOUT_SECONDS: Final = 120
MAX_SAID_BYTES: Final = 1024 * 1024
"""How much of what opa prints is read, but for a syntax tree."""
MAX_TREE_BYTES: Final = 256 * 1024 * 1024
"""Largest syntax tree of one file that is read."""
MAX_SHOWN_BYTES: Final = 16 * 1024
"""How much of what it says about Rego that does not compile is shown."""


def find_opa(opa: Path | None) -> Path:
    """The absolute path of the opa command, given or on PATH. Raises BundleError."""
    found = opa or shutil.which("opa")
    if found is None:
        raise BundleError(
            ReasonCode.POLICY_UNAVAILABLE,
            "The policy holds Rego that is yet to be compiled, and there is no opa command on"
            " PATH. Install OPA, name it (policy.opa_command, --opa), or build the bundle where"
            f" it is: pdp policy build DIRECTORY, or {_BUILD} -b DIRECTORY",
        )
    return Path(found).absolute()


_BUILD: Final = "opa build -t wasm " + " ".join(f"-e {name}" for name in REQUIRED_ENTRYPOINTS)


def compile_rego(
    rego: Mapping[str, str],
    data: bytes,
    *,
    opa: Path | None,
    entrypoints: Sequence[str] | None = None,
) -> bytes:
    """The Wasm of all Rego but its tests: the same for the same Rego. Without entrypoints
    it has those that the sidecar asks for, the optional ones where the Rego has such a
    rule. Raises BundleError, with what opa says.
    """
    command = find_opa(opa)
    sources = {name: text.encode() for name, text in rego.items() if not is_test(name)}
    if not sources:
        raise _failed("holds no Rego that could be compiled")
    manifest = {"roots": [""], "rego_version": REGO_VERSION}
    sources |= {"data.json": data, MANIFEST: json.dumps(manifest).encode()}
    try:
        with tempfile.TemporaryDirectory(prefix="pdp-compile-") as scratch:
            return _compile(command, sources, entrypoints, Path(scratch))
    except OSError as error:
        raise _failed(f"could not be compiled: {error.strerror}") from None


def build_files(
    files: Files, *, opa: Path | None, revision: str | None, sequence: int | None
) -> dict[str, bytes]:
    """What a release of these sources holds: their Rego in full, so that a real OPA and the
    tests run it too, one data.json, policy.wasm and the manifest. It is not signed yet.

    The manifest does not list the module's entrypoints ("wasm"): an OPA without a Wasm
    engine, which most are, would refuse the release, and the others run the Rego as well.

    Without a revision it gets the sources' own, or a digest of what decides; without a
    sequence the sources' own, if any. The same bytes for the same arguments. Raises
    BundleError.
    """
    place = "that is to be built"
    manifest = manifest_document(files, place=place)
    manifest.pop("wasm", None)
    if revision is not None:
        manifest["revision"] = revision
    if sequence is not None:
        manifest["metadata"] = _with_sequence(manifest.get("metadata", {}), sequence)
    sources = {name: files[name] for name in files if name not in {WASM, SIGNATURES}}
    sources[MANIFEST] = json.dumps(manifest).encode()
    part = read_part(sources, name="build", place=place, verifier=None)
    data = canonical_bytes(part.data)
    manifest |= {
        "revision": part.manifest.revision,
        "roots": list(part.manifest.roots),
        "rego_version": REGO_VERSION,
    }
    built = {path: files[path] for path in part.rego}
    built["data.json"] = data
    built[WASM] = compile_rego(part.rego, data, opa=opa)
    built[MANIFEST] = json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"
    read_part(built, name="build", place=place, verifier=None)
    return built


def _with_sequence(metadata: JsonValue, sequence: int) -> JsonObject:
    known = metadata if isinstance(metadata, dict) else {}
    own = known.get("pdp")
    return {**known, "pdp": {**(own if isinstance(own, dict) else {}), "sequence": sequence}}


def _compile(
    command: Path,
    sources: Mapping[str, bytes],
    entrypoints: Sequence[str] | None,
    scratch: Path,
) -> bytes:
    folder, target = scratch / "rego", scratch / "bundle.tar.gz"
    for name, content in sources.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    capabilities = scratch / "capabilities.json"
    capabilities.write_bytes(offline_capabilities(command))
    # `opa build` lets a rule stand where data stands, and an OPA server refuses that.
    _run(command, "check", "--bundle", ".", "--capabilities", str(capabilities), folder=folder)
    arguments = ["build", "--target", "wasm", "--bundle", ".", "--output", str(target)]
    for entrypoint in entrypoints or (
        *REQUIRED_ENTRYPOINTS,
        *_optional_entrypoints(command, sources, folder),
    ):
        arguments += ["--entrypoint", entrypoint]
    _run(command, *arguments, folder=folder)
    with target.open("rb") as built:
        packed = built.read(MAX_ARCHIVE_BYTES + 1)
    files = read_archive(packed, place="that opa built")
    if WASM not in files:
        raise _failed(f"was compiled without {WASM}: this is another opa command than is known")
    return files[WASM]


def _optional_entrypoints(
    command: Path, sources: Mapping[str, bytes], folder: Path
) -> list[Entrypoint]:
    """Those that the Rego, which lies in a folder and is sound, has a rule for."""
    optional = {name: segments(name) for name in Entrypoint if name.optional}
    present = set()
    for file, content in sources.items():
        package = package_of(content.decode()) if file.endswith(".rego") else None
        # Only a few files can have such a rule; opa tells whether they do.
        if package is None or not any(_meet(package, path) for path in optional.values()):
            continue
        said = _run(
            command,
            *("parse", "--format", "json", "--json-include", "-comments", str(folder / file)),
            folder=folder,
            most=MAX_TREE_BYTES,
        )
        try:
            rules = list(rule_paths(json.loads(said)))
        except (ValueError, RecursionError, KeyError, TypeError):
            raise _failed("can not be compiled: opa does not say which rules it has") from None
        present |= {name for name, path in optional.items() if any(_meet(r, path) for r in rules)}
    return [name for name in optional if name in present]


def _meet(one: Sequence[str], other: Sequence[str]) -> bool:
    return leads_to(one, other) or leads_to(other, one)


def offline_capabilities(opa: Path) -> bytes:
    """For ``opa check``, ``test`` and ``eval --capabilities``: all that this opa can do, but
    with no host that it may ask. Without it those three fetch the schemas that a comment
    in the Rego points to. Raises BundleError and OSError.
    """
    said = _run(opa, "capabilities", "--current", folder=Path("/"))
    try:
        capabilities = parse_object(said, max_bytes=MAX_SAID_BYTES)
    except JsonError:
        raise _failed("can not be compiled: opa does not say what it can do") from None
    return json.dumps({**capabilities, "allow_net": []}).encode()


def _run(command: Path, *arguments: str, folder: Path, most: int = MAX_SAID_BYTES) -> bytes:
    """What opa prints. Raises BundleError with it when opa fails, and OSError."""
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(  # noqa: S603 - the operator's own opa
                [command, *arguments],
                cwd=folder,  # so that the Wasm is the same wherever that lies
                env={},  # OPA_... would change what is built
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=COMPILE_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _failed(f"was not compiled within {COMPILE_TIMEOUT_SECONDS} seconds") from None
        output.seek(0)
        said = output.read(most)
    if done.returncode != 0:
        text = said[:MAX_SHOWN_BYTES].decode(errors="replace").strip()
        raise _failed(f"does not compile:\n{text}")
    return said


def _failed(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy {what}")
