"""The worker's one socket: frames in, frames out, blocking."""

from __future__ import annotations

import socket
from collections import deque

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameDecoder, FrameKind, encode_frame, frame_header

_RECEIVE_BYTES = 512 * 1024


class ChannelClosed(Exception):
    """The daemon closed the socket: nobody wants the results."""


class Channel:
    """Frames over a blocking stream socket, in order.

    `recv` and `sendmsg`-free on purpose: no descriptor can come in or go out.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = FrameDecoder()
        self._ready: deque[Frame] = deque()

    def send_hello(self, public_key: bytes) -> None:
        self.send(FrameKind.HELLO, public_key)

    def send(self, kind: FrameKind, body: bytes = b"") -> None:
        try:
            # One call for small frames; for large ones a second call is cheaper than a copy.
            if len(body) <= 16 * 1024:
                self._sock.sendall(encode_frame(kind, body))
            else:
                self._sock.sendall(frame_header(kind, len(body)))
                self._sock.sendall(body)
        except OSError as exc:
            raise ChannelClosed from exc

    def receive_untrusted(self) -> Frame:
        """The next frame.  Raises ChannelClosed at end-of-file."""
        while not self._ready:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except OSError as exc:
                raise ChannelClosed from exc
            if not data:
                raise ChannelClosed
            self._decoder.feed(data)
            self._ready.extend(self._decoder)
        return self._ready.popleft()

    @property
    def has_ready(self) -> bool:
        """True while a whole frame is already here."""
        return bool(self._ready)

    def expect_untrusted(self, kind: FrameKind) -> bytes:
        """The next frame's body, which must be of `kind`."""
        got, body = self.receive_untrusted()
        if got is not kind:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, got.name)
        return body
