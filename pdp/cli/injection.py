"""`pdp injection-webhook`: put the sidecar into pods, where the API server can not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdp.cli import exit_codes


def injection_webhook(
    *,
    injection: Annotated[Path, typer.Option(help="What is injected, as the chart renders it.")],
    certificate: Annotated[Path, typer.Option(help="The server's certificate chain (PEM).")],
    key: Annotated[Path, typer.Option(help="Its private key (PEM).")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The port to listen on.")] = 8443,
) -> None:
    """Serve the admission webhook that puts the sidecar into pods by label.

    For clusters without MutatingAdmissionPolicy (docs/kubernetes.md). Exit codes: 0 stopped
    in order, 2 a file can not be used, 3 can not start.
    """
    import asyncio  # noqa: PLC0415 - start-up imports only what the command needs
    import logging  # noqa: PLC0415

    from pdp.injection.patch import InjectionError  # noqa: PLC0415
    from pdp.injection.webhook import serve  # noqa: PLC0415

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for file in (certificate, key):
        if not file.is_file():
            typer.echo(f"{file}: there is no such file", err=True)
            raise typer.Exit(exit_codes.USAGE)
    try:
        asyncio.run(
            serve(injection, certificate_file=certificate, key_file=key, host=host, port=port)
        )
    except InjectionError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    except OSError as error:
        typer.echo(f"pdp: can not start: {error.strerror or type(error).__name__}.", err=True)
        raise typer.Exit(exit_codes.CAN_NOT_START) from None
