"""Plaintext in and out of a Noise connection, many messages per system call.

libp2p reads a Noise message with two awaits for its length and two for its body and writes each
with its own system call; measured, that is most of the cost of a transfer.  Once the handshake
and the choice of the muxer are done, this takes the socket over and works in batches.

    u16 big-endian length ‖ ciphertext (at most 65,535 bytes, the last 16 of them the tag)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import trio
from libp2p.abc import ConnectionType, ISecureConn

MAX_PLAINTEXT_BYTES: Final = 65_519
_TAG_BYTES: Final = 16
_RECEIVE_BYTES: Final = 256 * 1024


class PipeClosed(Exception):
    """The connection has ended, from whichever side."""


class NoisePipe:
    """Owns the socket below `secured_conn` from now on; nothing else may read or write it."""

    def __init__(self, secured_conn: ISecureConn) -> None:
        session: Any = secured_conn
        transport = session.conn  # NoiseTransportReadWriter
        raw = transport.read_writer.read_write_closer  # RawConnection
        self.connection_type: ConnectionType = raw.get_connection_type()
        self._socket: trio.SocketStream = raw.stream.stream
        self.remote_address = remote_address(self._socket)
        self._encrypt = transport.noise_state.encrypt
        self._decrypt = transport.noise_state.decrypt
        # What the negotiation of the muxer read past its own end.
        self._early: bytes = session._drain(None)
        self._ciphertext = bytearray()

    async def receive(self) -> bytes:
        """What one read of the socket completed.  Raises PipeClosed at the end."""
        if self._early:
            early, self._early = self._early, b""
            return early
        while True:
            try:
                data = await self._socket.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise PipeClosed("the connection was lost") from exc
            if not data:
                raise PipeClosed("the peer closed the connection")
            self._ciphertext += data
            plaintext = self._open_messages_untrusted()
            if plaintext:
                return plaintext

    def _open_messages_untrusted(self) -> bytes:
        pieces: list[bytes] = []
        at = 0
        data = self._ciphertext
        while len(data) - at >= 2:
            end = at + 2 + ((data[at] << 8) | data[at + 1])
            if end > len(data):
                break
            if end - at - 2 < _TAG_BYTES:
                raise PipeClosed("a Noise message shorter than its tag")
            try:
                pieces.append(self._decrypt(bytes(data[at + 2 : end])))
            except Exception as exc:  # the Noise library raises whatever its cipher does
                raise PipeClosed("a Noise message that does not verify") from exc
            at = end
        del data[:at]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def send(self, frames: Sequence[bytes]) -> None:
        """Seal `frames` and write them.  Not to be cancelled unless the connection is given up."""
        sealed: list[bytes] = []
        for plaintext in _packed(frames):
            ciphertext = self._encrypt(plaintext)
            sealed.append(len(ciphertext).to_bytes(2, "big"))
            sealed.append(ciphertext)
        try:
            await self._socket.send_all(b"".join(sealed))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PipeClosed("the connection was lost") from exc

    def close(self) -> None:
        self._socket.socket.close()


def remote_address(stream: trio.SocketStream) -> tuple[str, int] | None:
    """IP and port of the other end; libp2p's own helper knows no IPv6."""
    try:
        name = stream.socket.getpeername()
    except OSError:
        return None
    return str(name[0]).partition("%")[0], int(name[1])


def _packed(frames: Sequence[bytes]) -> list[bytes]:
    """`frames` joined to as few Noise plaintexts as possible, without cutting large ones."""
    packed: list[bytes] = []
    run: list[bytes] = []
    run_bytes = 0
    for frame in frames:
        if run_bytes + len(frame) > MAX_PLAINTEXT_BYTES and run:
            packed.append(b"".join(run))
            run, run_bytes = [], 0
        run.append(frame)
        run_bytes += len(frame)
    if run:
        packed.append(run[0] if len(run) == 1 else b"".join(run))
    return packed
