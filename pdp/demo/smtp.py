"""A real SMTP server on loopback that lets nobody send without a login."""

from __future__ import annotations

import asyncio
import email
import hmac
import logging
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from pdp.demo.mail import MailAccount

_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A message that the server took in."""

    login: str
    """Who sent it: the login, not what the message says."""
    sender: str
    recipients: tuple[str, ...]
    subject: str


class SmtpServer:
    """Takes mail in from the accounts it knows, in a thread of its own."""

    def __init__(self, accounts: Iterable[MailAccount]) -> None:
        self.delivered: list[Delivered] = []
        self._accounts = {account.login.name: account for account in accounts}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="smtp", daemon=True)
        # The library warns of each login without TLS; this server is on loopback.
        logging.getLogger("mail.log").setLevel(logging.ERROR)

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(
            self._loop.create_server(self._session, host=_HOST, port=0), self._loop
        )
        self._server = listening.result()
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        sessions = asyncio.all_tasks() - {asyncio.current_task()}
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    def _session(self) -> SMTP:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            return SMTP(
                self,
                hostname="localhost",
                auth_required=True,
                auth_require_tls=False,
                authenticator=self._authenticate,
                loop=self._loop,
            )

    def _authenticate(
        self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, shown: object
    ) -> AuthResult:
        if isinstance(shown, LoginPassword):
            name = shown.login.decode("utf-8", "replace")
            account = self._accounts.get(name)
            if account is not None and hmac.compare_digest(
                account.login.password.encode("utf-8"), shown.password
            ):
                return AuthResult(success=True, auth_data=name)
        return AuthResult(success=False, handled=False)

    async def handle_MAIL(  # noqa: N802 - the library's name
        self, _server: SMTP, session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """A login sends from its own address only."""
        if self._accounts[str(session.auth_data)].sender != address:
            return "553 5.7.1 Not your address"
        envelope.mail_from = address
        return "250 OK"

    async def handle_DATA(  # noqa: N802 - the library's name
        self, _server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        """Take the message in."""
        content = envelope.content
        message = email.message_from_bytes(
            content if isinstance(content, bytes) else str(content).encode("utf-8")
        )
        self.delivered.append(
            Delivered(
                login=str(session.auth_data),
                sender=str(envelope.mail_from),
                recipients=tuple(envelope.rcpt_tos),
                subject=str(message["Subject"]),
            )
        )
        return "250 OK"
