"""``pdp keys``: show and rotate the keys that sign permits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdp.permit.ring import KeyRing

app = typer.Typer(no_args_is_help=True)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="The sidecar's configuration, which says where the keys lie."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--file", help="The keys themselves, for a file that is mounted elsewhere."),
]
Kid = Annotated[str, typer.Argument(help="The key's id, as pdp keys list shows it.")]


_TAKES_ANY_KID: Final = {"ignore_unknown_options": True}
"""One key id in 64 begins with a hyphen."""


@app.command("list")
def list_keys(
    config: ConfigFile = None,
    file: KeyFile = None,
    output: Annotated[Output, typer.Option(help="For people, or as JSON.")] = Output.TEXT,
) -> None:
    """List the keys, and what each is for; nothing secret.

    Exit codes: 0 done, 2 the file or the configuration can not be used.
    """
    import json  # noqa: PLC0415 - start-up imports only what the command needs

    _, ring = _open(config, file)
    signing = ring.signing.kid
    listed = [
        {
            "kid": key.kid,
            "use": "signs"
            if key.kid == signing
            else ("may sign next" if key.private is not None else "verifies"),
        }
        for key in ring.keys
    ]
    if output is Output.JSON:
        typer.echo(json.dumps(listed))
        return
    for key in listed:
        typer.echo(f"{key['kid']}  {key['use']}")


@app.command()
def add(config: ConfigFile = None, file: KeyFile = None) -> None:
    """Make a key that is published, and does not sign yet.

    Exit codes: 0 done, 2 the file or the configuration can not be used.
    """
    path, ring = _open(config, file)
    ring = ring.with_next()
    _write(ring, path)
    typer.echo(ring.keys[-1].kid)


@app.command(context_settings=_TAKES_ANY_KID)
def use(kid: Kid, config: ConfigFile = None, file: KeyFile = None) -> None:
    """Let a key sign. The one that signed before only verifies from then on.

    Exit codes: 0 done, 2 there is no such private key, or the file or the configuration can
    not be used.
    """
    path, ring = _open(config, file)
    _write(_changed(lambda: ring.signing_with(kid)), path)
    typer.echo(f"{kid} signs. Retire {ring.signing.kid} once nobody shows its permits any more.")


@app.command(context_settings=_TAKES_ANY_KID)
def retire(kid: Kid, config: ConfigFile = None, file: KeyFile = None) -> None:
    """Forget a key: its permits count no more, and outcomes under them can not be reported.

    Exit codes: 0 done, 2 there is no such key, it is the one that signs, or the file or the
    configuration can not be used.
    """
    path, ring = _open(config, file)
    _write(_changed(lambda: ring.without(kid)), path)
    typer.echo(f"{kid} is retired.")


@app.command()
def rotate(
    config: ConfigFile = None,
    file: KeyFile = None,
    overlap_seconds: Annotated[
        int,
        typer.Option(
            min=0,
            max=86_400,
            help="How long the new key is published before it signs: as long as tool servers"
            " take to look for new keys.",
        ),
    ] = 60,
) -> None:
    """Publish a new key, wait, and let it sign; running sidecars follow within a second.

    The key that signed before still verifies, until it is retired. Where this is stopped
    half way, the next rotation goes on with the key that is published already.

    Exit codes: 0 done, 2 the file or the configuration can not be used.
    """
    path, ring = _open(config, file)
    before = ring.signing.kid
    waiting = [key.kid for key in ring.keys if key.private is not None and key.kid != before]
    if not waiting:
        ring = ring.with_next()
        _write(ring, path)
        waiting = [ring.keys[-1].kid]
    _wait(f"{waiting[0]} is published", overlap_seconds)
    # Whoever changed the file meanwhile is not overruled.
    _, ring = _open(config, file)
    _write(_changed(lambda: ring.signing_with(waiting[0])), path)
    typer.echo(f"{waiting[0]} signs. Its permits and those of {before} both count.")
    typer.echo(f"Once no permit of the old key is about any more: pdp keys retire {before}")


def _wait(what: str, seconds: int) -> None:
    import time  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    ends_at = time.monotonic() + seconds
    for _ in track(range(seconds), description=what, console=Console(stderr=True), transient=True):
        time.sleep(min(1.0, max(0.0, ends_at - time.monotonic())))


def _open(config: Path | None, file: Path | None) -> tuple[Path, KeyRing]:
    import os  # noqa: PLC0415

    from pdp.config import ConfigError, load_config  # noqa: PLC0415
    from pdp.permit.ring import KeyRing  # noqa: PLC0415

    if (config is None) is (file is None):
        typer.echo("pdp: name the keys by --config or by --file.", err=True)
        raise typer.Exit(exit_codes.USAGE)
    path = file
    if config is not None:
        try:
            path = load_config(config, os.environ).permit_key_file
        except ConfigError as error:
            typer.echo(error.message, err=True)
            raise typer.Exit(exit_codes.USAGE) from None
    assert path is not None  # noqa: S101 - one of the two was named
    found = path
    return found, _changed(lambda: KeyRing.from_file(found))


def _changed(change: Callable[[], KeyRing]) -> KeyRing:
    from pdp.permit.claims import PermitError  # noqa: PLC0415

    try:
        return change()
    except PermitError as error:
        typer.echo(f"pdp: {error.message}", err=True)
        raise typer.Exit(exit_codes.USAGE) from None


def _write(ring: KeyRing, path: Path) -> None:
    try:
        ring.write(path)
    except OSError as error:
        typer.echo(
            f"pdp: {path} can not be written: {error.strerror}. Where it is mounted, change a copy"
            " of it (--file), and put that where it comes from.",
            err=True,
        )
        raise typer.Exit(exit_codes.USAGE) from None
