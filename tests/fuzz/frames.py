"""HTTP/2 by hand (RFC 9113), so that nothing keeps a client from misusing it."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from enum import IntEnum
from types import TracebackType
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
SEND_SECONDS: Final = 2.0
"""A server that takes no more for so long has stopped the client, which is its right."""


class Kind(IntEnum):
    """Of a frame."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Setting(IntEnum):
    """Of a connection."""

    HEADER_TABLE_SIZE = 1
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(values: Iterable[tuple[int, int]] = ()) -> bytes:
    """A SETTINGS frame."""
    return frame(Kind.SETTINGS, b"".join(struct.pack(">HI", *each) for each in values))


def headers(path: str, *, more: Iterable[tuple[bytes, bytes]] = (), token: str = "") -> bytes:
    """The header block of a gRPC call (RFC 7541 6.2.2: literals that are not remembered)."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    ]
    if token:
        fields.append((b"authorization", f"Bearer {token}".encode()))
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def remembered(name: bytes, value: bytes) -> bytes:
    """A field that the other side is to keep in its table (RFC 7541 6.2.1)."""
    return b"\x40" + _text(name) + _text(value)


LAST_REMEMBERED: Final = b"\xbe"
"""The field that was kept last (RFC 7541 6.1, index 62)."""


def message(content: bytes) -> bytes:
    """A gRPC message."""
    return struct.pack(">BI", 0, len(content)) + content


class Connection:
    """A connection over a Unix socket that says whatever it is told to."""

    def __init__(self, path: str, *, greets: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SEND_SECONDS)
        self.socket.connect(path)
        if greets:
            self.say(PREFACE + settings())

    def say(self, *pieces: bytes) -> bool:
        """Whether the server has taken it; it may hang up, or let the client wait."""
        try:
            self.socket.sendall(b"".join(pieces))
        except OSError:
            return False
        return True

    def hear(self, seconds: float = 0.5) -> bytes:
        """What the server says until it is silent for that long, or hangs up."""
        heard = bytearray()
        self.socket.settimeout(seconds)
        with contextlib.suppress(OSError):
            while part := self.socket.recv(65_536):
                heard += part
        self.socket.settimeout(SEND_SECONDS)
        return bytes(heard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()


def kinds_in(heard: bytes) -> list[int]:
    """The kinds of the frames that a server has sent."""
    found = []
    while len(heard) >= 9:
        found.append(heard[3])
        heard = heard[9 + int.from_bytes(heard[:3]) :]
    return found


def _text(content: bytes) -> bytes:
    """A string literal (RFC 7541 5.2), without Huffman's code."""
    size = len(content)
    if size < 127:
        return bytes([size]) + content
    head = bytearray([127])
    size -= 127
    while size >= 128:
        head.append(size % 128 + 128)
        size //= 128
    return bytes([*head, size]) + content
