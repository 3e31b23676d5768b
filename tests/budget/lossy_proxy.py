"""A proxy between a ledger and its server that loses or repeats a reply when told to."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self


class LossyProxy:
    def __init__(self, server: Path, own: Path) -> None:
        self.server = server
        self.socket = own
        self.lost = 0
        self._lose = False
        self._repeat = False
        self._last = b""

    def lose_next_reply(self) -> None:
        """The server does what it is asked, and the connection ends before its reply."""
        self._lose = True

    def repeat_last_reply(self) -> None:
        """In place of the next reply, the one before comes again."""
        self._repeat = True

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(self._serve, self.socket)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        await self._listener.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self.server)
        there = asyncio.create_task(self._pass_on(reader, up_writer))
        try:
            while reply := await up_reader.read(1 << 20):
                if self._lose:
                    self._lose = False
                    self.lost += 1
                    break
                if self._repeat:
                    self._repeat = False
                    reply = self._last
                self._last = reply
                writer.write(reply)
                await writer.drain()
        except OSError:
            pass
        finally:
            there.cancel()
            for each in (writer, up_writer):
                each.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while request := await reader.read(1 << 20):
                writer.write(request)
                await writer.drain()
            writer.close()
