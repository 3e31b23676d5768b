"""The mail tool server: sends through SMTP, each tenant with its own login."""

from __future__ import annotations

import smtplib
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Final

from pdp.canonical import JsonObject
from pdp.demo.tenants import Login
from pdp.tool import PermitDoor

_TIMEOUT_SECONDS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MailAccount:
    """A tenant's own account at the SMTP server."""

    login: Login
    sender: str
    """The only address that it may send from."""


class MailServer:
    """What an agent's tool mail.send reaches. The permit alone says whose account
    sends.
    """

    def __init__(
        self, door: PermitDoor, *, address: tuple[str, int], accounts: Mapping[str, MailAccount]
    ) -> None:
        """``address`` is the SMTP server's; ``accounts`` are by tenant id."""
        self._door = door
        self._address = address
        self._accounts = accounts

    def send(self, permit: str, arguments: JsonObject) -> JsonObject:
        """Send one message. Raises PermitError, smtplib.SMTPException."""
        tenant = self._door.admit(permit, tool="mail.send", arguments=arguments).tenant
        account = self._accounts[tenant]
        message = EmailMessage()
        message["From"] = account.sender
        message["To"] = str(arguments["to"])
        message["Subject"] = str(arguments["subject"])
        message.set_content(str(arguments["body"]))
        host, port = self._address
        with smtplib.SMTP(
            host, port, local_hostname="localhost", timeout=_TIMEOUT_SECONDS
        ) as connection:
            connection.login(account.login.name, account.login.password)
            connection.send_message(message)
        return {"sent_to": str(arguments["to"])}
