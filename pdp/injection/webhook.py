"""The admission webhook: an HTTPS server that an API server asks about each new pod."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import signal
import ssl
from pathlib import Path
from typing import Final

from aiohttp import web

from pdp.canonical import JsonError, JsonObject, parse_object
from pdp.injection.patch import Injection, InjectionError, patch

MAX_REVIEW_BYTES: Final = 4 * 1024 * 1024
"""More than an API server lets an object be."""
CERTIFICATE_SECONDS: Final = 60.0
"""How often the certificate is read again."""
_log: Final = logging.getLogger(__name__)


def application(injection_file: Path) -> web.Application:
    """Answers ``POST /inject`` and ``GET /healthz``. What is injected is read for every
    review, so that a ConfigMap that was changed is in force. Raises InjectionError where
    it can not be read at the start.
    """
    Injection.from_file(injection_file)

    async def inject(request: web.Request) -> web.Response:
        try:
            review = parse_object(await request.read(), max_bytes=MAX_REVIEW_BYTES)
        except JsonError:
            review = {}
        asked = review.get("request")
        pod = asked.get("object") if isinstance(asked, dict) else None
        if not isinstance(asked, dict) or not isinstance(pod, dict):
            raise web.HTTPBadRequest(text="expected an AdmissionReview of a pod\n")
        try:
            operations = patch(pod, Injection.from_file(injection_file))
        except InjectionError as error:
            # The API server then refuses the pod (failurePolicy: Fail).
            _log.error("%s", error.message)
            raise web.HTTPInternalServerError(text="the review failed; see the log\n") from None
        return web.json_response(_answer(asked.get("uid"), operations))

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    served = web.Application(client_max_size=MAX_REVIEW_BYTES)
    served.router.add_post("/inject", inject)
    served.router.add_get("/healthz", healthz)
    return served


async def serve(
    injection_file: Path, *, certificate_file: Path, key_file: Path, host: str, port: int
) -> None:
    """Serve until SIGTERM or SIGINT. Raises InjectionError and OSError (ssl.SSLError)."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate_file, key_file)
    runner = web.AppRunner(application(injection_file), access_log=None)
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    try:
        await web.TCPSite(runner, host, port, ssl_context=context).start()
        _log.info("serving on %s:%d", host, port)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), CERTIFICATE_SECONDS)
            # A certificate that was renewed is shown to whoever connects from now on.
            try:
                context.load_cert_chain(certificate_file, key_file)
            except OSError:
                _log.error("the certificate can not be read; the one of before is shown")
    finally:
        await runner.cleanup()


def _answer(uid: object, operations: list[JsonObject]) -> JsonObject:
    response: JsonObject = {"uid": str(uid), "allowed": True}
    if operations:
        patched = json.dumps(operations).encode("utf-8")
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(patched).decode("ascii")}
    return {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": response,
    }
