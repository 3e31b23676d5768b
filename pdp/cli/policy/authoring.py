"""``pdp policy init``, ``build``, ``sign``, ``verify``, ``check``, ``test``, ``fmt``, ``schema``."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from pdp.canonical import JsonObject
    from pdp.policy.authoring.check import Checked
    from pdp.policy.authoring.findings import Finding
    from pdp.policy.authoring.release import Signer, Verified
    from pdp.policy.authoring.testing import Ran, Report, Result
    from pdp.policy.part import Part

app = typer.Typer()

FINDINGS_SHOWN: Final = 100
"""Findings that people are shown; JSON has them all."""
ROWS_SHOWN: Final = 20
"""Lines without a test that are shown of one file."""


OutputOption = Annotated[Output, typer.Option("--output", help="For people, or as JSON.")]
BundlePath = Annotated[Path, typer.Argument(help="A directory of sources, or a .tar.gz.")]
BundleFile = Annotated[Path, typer.Argument(help="A bundle that is built: a .tar.gz.")]
OpaOption = Annotated[Path | None, typer.Option("--opa", help="The opa command. Default: on PATH.")]
KeyId = Annotated[str | None, typer.Option("--key-id", help="The name that sidecars know it by.")]
Algorithm = Annotated[
    str, typer.Option("--algorithm", help="EdDSA, ES256, RS256, PS256, or their larger forms.")
]
Scope = Annotated[
    str | None,
    typer.Option("--scope", help="What it is for; sidecars take only what is for their scope."),
]
SigningKey = Annotated[
    Path | None, typer.Option("--signing-key", help="PEM file with the private key.")
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where; it must be empty, or not there yet.")],
) -> None:
    """Begin a policy: the starter bundle, with its tests, an example of each kind of data,
    cases for `pdp policy matrix`, and the schemas of input and answers.

    Exit codes: 0 written, 2 it is not empty, or can not be written.
    """
    from pdp.policy.authoring.starting import start  # noqa: PLC0415

    with _refusals():
        files = start(directory)
    for name in files:
        typer.echo(directory / name)
    typer.echo(f"Next: read {directory / 'README.md'}")


@app.command()
def build(
    path: BundlePath,
    *,
    file: Annotated[Path, typer.Option("-o", "--out", help="The .tar.gz to write.")],
    revision: Annotated[
        str | None,
        typer.Option(help="Its name. Default: the one in .manifest, or a digest of what decides."),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=0, help="Grows with every release. Default: the time in Unix seconds."),
    ] = None,
    signing_key: SigningKey = None,
    key_id: KeyId = None,
    algorithm: Algorithm = "EdDSA",
    scope: Scope = None,
    opa: OpaOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Build what a sidecar loads: Rego, its tests, data and Wasm, signed where a key is given.
    An earlier release can be built again, with a later sequence: so it is gone back to.

    The same sources, revision, sequence and key (EdDSA, RS...) give the same bytes.

    Exit codes: 0 built, 2 it does not compile, or something can not be used.
    """
    from pdp.policy.archive import refused  # noqa: PLC0415
    from pdp.policy.authoring import release  # noqa: PLC0415
    from pdp.policy.authoring.command import opa_command  # noqa: PLC0415
    from pdp.policy.authoring.sources import read_files  # noqa: PLC0415
    from pdp.policy.part import read_part  # noqa: PLC0415

    with _refusals():
        signer = None
        if signing_key is not None:
            signer = _signer(signing_key, key_id, algorithm, scope)
        elif key_id is not None or scope is not None:
            raise typer.BadParameter("needs --signing-key too.", param_hint="--key-id, --scope")
        sources = read_files(path)
        if not read_part(sources, name=path.name, place=str(path), verifier=None).rego:
            raise refused(str(path), "holds no Rego to build")
        archive, part = release.build(
            sources,
            opa=opa_command(opa),
            revision=revision,
            sequence=int(time.time()) if sequence is None else sequence,
            signer=signer,
        )
        _write(file, archive)
    _show(output, _built_json(file, archive, part, signer), _built_lines(file, part, signer))


@app.command()
def sign(
    file: BundleFile,
    *,
    signing_key: Annotated[
        Path, typer.Option("--signing-key", help="PEM file with the private key.")
    ],
    key_id: Annotated[str, typer.Option("--key-id", help="The name that sidecars know it by.")],
    algorithm: Algorithm = "EdDSA",
    scope: Scope = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write here. Default: the same file.")
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Sign a bundle, in place of the signature that it had.

    Exit codes: 0 signed, 2 it is no bundle, or the key does not fit.
    """
    from pdp.policy.archive import pack, read_archive  # noqa: PLC0415
    from pdp.policy.authoring import release  # noqa: PLC0415
    from pdp.policy.authoring.sources import read_content  # noqa: PLC0415
    from pdp.policy.part import read_part  # noqa: PLC0415

    target = out or file
    with _refusals():
        signer = _signer(signing_key, key_id, algorithm, scope)
        files = release.signed(read_archive(read_content(file), place=str(file)), signer)
        part = read_part(files, name=file.name, place=str(file), verifier=None)
        archive = pack(files)
        _write(target, archive)
    _show(output, _built_json(target, archive, part, signer), _built_lines(target, part, signer))


@app.command()
def verify(
    file: BundleFile,
    *,
    public_key: Annotated[Path, typer.Option("--public-key", help="PEM file.")],
    key_id: Annotated[
        str, typer.Option("--key-id", help="The key id that the signature must name.")
    ],
    algorithm: Algorithm = "EdDSA",
    scope: Scope = None,
    opa: OpaOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check a bundle as a sidecar would that trusts this key, and say what it is.

    Where there is an opa command it also builds the Rego and compares the Wasm, which
    differs, too, when another version of OPA built it.

    Exit codes: 0 good, 1 it would be refused, or its Wasm is not what its Rego builds,
    2 the file or the key can not be read.
    """
    from pdp.errors import PdpError  # noqa: PLC0415
    from pdp.policy.authoring import release  # noqa: PLC0415
    from pdp.policy.authoring.sources import read_content  # noqa: PLC0415
    from pdp.policy.signature import VerificationKey, Verifier  # noqa: PLC0415

    with _refusals():
        archive = read_content(file)
        key = VerificationKey(pem=_public_key(public_key), algorithm=_algorithm(algorithm))
        try:
            found = release.verify(
                archive,
                place=str(file),
                verifier=Verifier(keys={key_id: key}, scope=scope),
                opa=opa,
            )
        except PdpError as error:
            _show(output, {"good": False, "message": error.message}, [])
            typer.echo(printable(error.message), err=True)
            raise typer.Exit(exit_codes.FAILED) from None
    is_good = found.wasm is not release.WasmOrigin.DIFFERS
    _show(output, _verified_json(found, is_good=is_good), _verified_lines(found, key_id))
    if not is_good:
        raise typer.Exit(exit_codes.FAILED)


@app.command()
def check(
    path: BundlePath,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    opa: OpaOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Look for what is wrong in a policy: it compiles, strictly and by the types of its
    input; each entrypoint answers in the agreed form; Regal has nothing to say, where it
    is on PATH; and every tool, role, scope and budget that the data name is defined.

    Exit codes: 0 nothing wrong, 1 errors (with --strict: or warnings), 2 it can not be read.
    """
    from pdp.policy.authoring.check import Commands  # noqa: PLC0415
    from pdp.policy.authoring.check import check as check_files  # noqa: PLC0415
    from pdp.policy.authoring.command import opa_command  # noqa: PLC0415
    from pdp.policy.authoring.findings import Severity  # noqa: PLC0415
    from pdp.policy.authoring.sources import read_files  # noqa: PLC0415

    with _refusals():
        regal = shutil.which("regal")
        commands = Commands(opa=opa_command(opa), regal=Path(regal) if regal else None)
        found = check_files(read_files(path), commands, place=str(path))
    is_good = not any(strict or each.severity is Severity.ERROR for each in found.findings)
    _show(output, _checked_json(found, is_good=is_good), _checked_lines(found))
    if not is_good:
        raise typer.Exit(exit_codes.FAILED)


@app.command("test")
def run_tests(
    path: BundlePath,
    *,
    min_coverage: Annotated[
        float, typer.Option(min=0, max=100, help="Fail below this percentage of lines.")
    ] = 0,
    opa: OpaOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Run the Rego tests of a policy in a real OPA and in the embedded engine.

    A test that only one of them passes is a failure. What the embedded engine can not run
    is named. In it, input is {} where a test sets none. No test reaches the network.

    Exit codes: 0 all pass, 1 one fails or too few lines are tested, 2 they can not be run.
    """
    from pdp.policy.authoring.command import opa_command  # noqa: PLC0415
    from pdp.policy.authoring.sources import read_files  # noqa: PLC0415
    from pdp.policy.authoring.testing import run_in_both_engines  # noqa: PLC0415
    from pdp.policy.bundle import assemble  # noqa: PLC0415
    from pdp.policy.part import read_part  # noqa: PLC0415

    with _refusals():
        part = read_part(read_files(path), name=path.name, place=str(path), verifier=None)
        report = run_in_both_engines(assemble([part]), opa=opa_command(opa), with_coverage=True)
    percent = None if report.coverage is None else report.coverage.percent
    is_good = bool(report.results) and not report.failures and (percent or 0) >= min_coverage
    _show(
        output,
        _tested_json(report, is_good=is_good),
        _tested_lines(report, min_coverage=min_coverage),
    )
    if not is_good:
        raise typer.Exit(exit_codes.FAILED)


@app.command()
def fmt(
    path: Annotated[Path, typer.Argument(help="A directory, or a .rego file.")],
    *,
    check_only: Annotated[
        bool, typer.Option("--check", help="Change nothing; name what is not formatted.")
    ] = False,
    opa: OpaOption = None,
) -> None:
    """Format Rego as OPA does, and name the files that were not.

    Exit codes: 0 formatted, 1 with --check: some file is not, 2 it can not be parsed.
    """
    from pdp.policy.archive import refused  # noqa: PLC0415
    from pdp.policy.authoring.command import opa_command, run  # noqa: PLC0415
    from pdp.policy.engine import BundleError  # noqa: PLC0415
    from pdp.reason import ReasonCode  # noqa: PLC0415

    with _refusals():
        if not path.exists():
            raise refused(str(path), "can not be formatted: there is no such file or directory")
        if not (path.suffix == ".rego" or (path.is_dir() and any(path.rglob("*.rego")))):
            raise refused(str(path), "can not be formatted: it is no .rego file, and holds none")
        command = opa_command(opa)
        listed = run(command, ["fmt", "--list", "--", str(path)], folder=Path.cwd())
        if listed.code == 0 and listed.output and not check_only:
            listed_again = run(command, ["fmt", "--write", "--", str(path)], folder=Path.cwd())
            listed = listed if listed_again.code == 0 else listed_again
        if listed.code != 0:
            raise BundleError(ReasonCode.POLICY_UNAVAILABLE, listed.errors.strip())
    typer.echo(_printable_lines(listed.output), nl=False)
    if check_only and listed.output:
        raise typer.Exit(exit_codes.FAILED)


@app.command()
def schema(
    name: Annotated[
        str | None, typer.Argument(help="Which one; without it they are listed.")
    ] = None,
) -> None:
    """Print the JSON Schema of what a policy is asked, or of what it answers.

    Exit codes: 0 printed, 2 there is no such schema.
    """
    from pdp.policy.authoring.schemas import schema_names, schema_text  # noqa: PLC0415

    if name is None:
        typer.echo("\n".join(schema_names()))
        return
    try:
        typer.echo(schema_text(name), nl=False)
    except KeyError:
        typer.echo(f"There is no such schema; there are {', '.join(schema_names())}.", err=True)
        raise typer.Exit(exit_codes.USAGE) from None


@contextmanager
def _refusals() -> Iterator[None]:
    """What can not be used is told on stderr, and ends the command with 2."""
    from pdp.errors import PdpError  # noqa: PLC0415

    try:
        yield
    except PdpError as error:
        typer.echo(_printable_lines(error.message), err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    except OSError as error:
        typer.echo(f"{error.filename or 'a file'} can not be used: {error.strerror}.", err=True)
        raise typer.Exit(exit_codes.USAGE) from None


def _signer(key: Path, key_id: str | None, algorithm: str, scope: str | None) -> Signer:
    from pdp.policy.authoring.release import Signer  # noqa: PLC0415

    if not key_id:
        raise typer.BadParameter("is needed with --signing-key.", param_hint="--key-id")
    return Signer(
        private_key_pem=_private_key(key),
        key_id=key_id,
        algorithm=_algorithm(algorithm),
        scope=scope,
    )


def _algorithm(name: str) -> str:
    from pdp.policy.signature import ALGORITHMS  # noqa: PLC0415

    if name not in ALGORITHMS:
        raise typer.BadParameter(
            f"must be one of {', '.join(ALGORITHMS)}.", param_hint="--algorithm"
        )
    return name


def _private_key(file: Path) -> bytes:
    """The text of a private key in PEM form."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_private_key,
    )

    pem = file.read_bytes()
    try:
        load_pem_private_key(pem, password=None)
    except TypeError:
        raise typer.BadParameter(
            f"{file} has a passphrase, which is not asked for; write the key without one:"
            " openssl pkey -in KEY -out NEW.",
            param_hint="--signing-key",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise typer.BadParameter(
            f"{file} is no private key in PEM form.", param_hint="--signing-key"
        ) from None
    return pem


def _public_key(file: Path) -> bytes:
    """The text of a public key in PEM form."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_public_key,
    )

    pem = file.read_bytes()
    try:
        load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise typer.BadParameter(
            f"{file} is no public key in PEM form.", param_hint="--public-key"
        ) from None
    return pem


def _write(file: Path, content: bytes) -> None:
    from pdp.policy.archive import refused  # noqa: PLC0415
    from pdp.policy.authoring.release import write_whole  # noqa: PLC0415

    try:
        write_whole(file, content)
    except OSError as error:
        raise refused(str(file), f"can not be written: {error.strerror}") from None


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))


def _show(output: Output, document: JsonObject, lines: Iterator[str] | list[str]) -> None:
    if output is Output.JSON:
        typer.echo(json.dumps(document))
    else:
        for line in lines:
            typer.echo(printable(line))


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# build, sign, verify


def _built_json(file: Path, archive: bytes, part: Part, signer: Signer | None) -> JsonObject:
    import hashlib  # noqa: PLC0415

    return {
        "file": str(file),
        "revision": part.manifest.revision,
        "sequence": part.manifest.sequence,
        "roots": list(part.manifest.roots),
        "files": len(part.files),
        "sha256": hashlib.sha256(archive).hexdigest(),
        "key_id": signer.key_id if signer else None,
        "scope": signer.scope if signer else None,
    }


def _built_lines(file: Path, part: Part, signer: Signer | None) -> Iterator[str]:
    yield f"{file}: {_counted(len(part.files), 'file')}"
    yield f"  revision {part.manifest.revision}"
    yield f"  sequence {part.manifest.sequence}"
    if signer is None:
        yield "  not signed"
    else:
        scope = f" for the scope {signer.scope}" if signer.scope else ""
        yield f"  signed with {signer.key_id}{scope}"


def _verified_json(found: Verified, *, is_good: bool) -> JsonObject:
    return {
        "good": is_good,
        "revision": found.revision,
        "sequence": found.sequence,
        "roots": list(found.roots),
        "files": list(found.files),
        "sha256": found.archive_sha256,
        "content": found.content,
        "wasm": found.wasm.value,
        "wasm_note": found.wasm_note,
    }


def _verified_lines(found: Verified, key_id: str) -> Iterator[str]:
    from pdp.policy.authoring.release import WasmOrigin  # noqa: PLC0415

    yield f"signed with {key_id}"
    yield f"  revision {found.revision}"
    yield f"  sequence {'none' if found.sequence is None else found.sequence}"
    yield f"  roots    {', '.join(root or '(all)' for root in found.roots) or 'none'}"
    yield f"  files    {', '.join(found.files)}"
    yield f"  file     sha256:{found.archive_sha256}"
    yield f"  content  {found.content}"
    yield {
        WasmOrigin.SAME: "  wasm     is what the Rego builds",
        WasmOrigin.DIFFERS: "  wasm     is NOT what the Rego builds with this opa command: another"
        " version of OPA built it, or it was made of other Rego",
        WasmOrigin.NOT_CHECKED: f"  wasm     not compared with the Rego: {found.wasm_note}",
    }[found.wasm]


# check


def _checked_json(found: Checked, *, is_good: bool) -> JsonObject:
    return {
        "good": is_good,
        "findings": [
            {
                "severity": each.severity.value,
                "message": each.message,
                "file": each.file,
                "line": each.row or None,
            }
            for each in found.findings
        ],
        "answers_checked": found.samples,
        "not_checked": list(found.notes),
    }


def _checked_lines(found: Checked) -> Iterator[str]:
    for each in found.findings[:FINDINGS_SHOWN]:
        yield from _finding_lines(each)
    more = len(found.findings) - FINDINGS_SHOWN
    if more > 0:
        yield f"and {more:,} more; --output json has them all"
    yield from found.notes
    if found.samples:
        yield f"{_counted(found.samples, 'answer')} held against the contract"
    yield f"{_counted(len(found.findings), 'finding')}"


def _finding_lines(each: Finding) -> Iterator[str]:
    place = f"{each.place}: " if each.place else ""
    first, *more = each.message.expandtabs().split("\n")
    yield f"{place}{each.severity.value}: {first}"
    yield from (f"  {line}" for line in more)


# test


def _tested_json(report: Report, *, is_good: bool) -> JsonObject:
    coverage = report.coverage
    return {
        "good": is_good,
        "tests": [
            {
                "name": each.name,
                "file": each.file,
                "line": each.row,
                "opa": _ran_json(each.opa),
                "embedded": _ran_json(each.embedded),
                "differs": each.engines_differ,
            }
            for each in report.results
        ],
        "coverage": None
        if coverage is None
        else {
            "percent": round(coverage.percent, 2),
            "missed": {file: list(rows) for file, rows in coverage.missed.items()},
        },
    }


def _ran_json(ran: Ran) -> JsonObject:
    return {
        "outcome": ran.outcome.value,
        "failed_cases": list(ran.failed_cases),
        "note": ran.note,
    }


def _tested_lines(report: Report, *, min_coverage: float) -> Iterator[str]:
    from pdp.policy.authoring.testing import Outcome  # noqa: PLC0415

    if not report.results:
        yield "There are no tests: write rules whose names begin with test_ in files *_test.rego."
        return
    for failure in report.failures:
        yield str(failure)
    for each in report.results:
        if each.embedded.outcome is Outcome.NOT_RUN:
            yield f"{_named(each)} was not run in the embedded engine: {_first_line(each)}"
        elif each.opa.outcome is Outcome.SKIPPED:
            yield f"{_named(each)} was skipped"
    passed = len(report.results) - len(report.failures)
    yield f"{passed:,} of {_counted(len(report.results), 'test')} passed"
    if report.coverage is None:
        yield "coverage was not measured, as a test failed"
        yield "To see which condition failed: opa test --bundle --var-values DIRECTORY"
        return
    enough = "" if report.coverage.percent >= min_coverage else f", less than {min_coverage:g} %"
    yield f"{report.coverage.percent:.1f} % of the lines are tested{enough}"
    for file, rows in report.coverage.missed.items():
        more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
        yield f"  {file}: not lines {', '.join(map(str, rows[:ROWS_SHOWN]))}{more}"


def _named(each: Result) -> str:
    return f"{each.file}:{each.row}: {each.name}"


def _first_line(each: Result) -> str:
    return each.embedded.note.split("\n")[0]
