"""Plaintext in and out of a Noise connection, many messages per system call.

libp2p reads a Noise message with two awaits for its length and two for its body and writes each
with its own system call; measured, that is most of the cost of a transfer.  Once the handshake
and the choice of the muxer are done, this takes the socket over and works in batches.

    u16 big-endian length ‖ ciphertext (at most 65,535 bytes, the last 16 of them the tag)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import ConnectionType, ISecureConn

MAX_PLAINTEXT_BYTES: Final = 65_519
_TAG_BYTES: Final = 16
_RECEIVE_BYTES: Final = 512 * 1024
_LAST_COUNT: Final = 2**64 - 1


class PipeClosed(Exception):
    """The connection has ended, from whichever side."""


class NoisePipe:
    """Owns the socket and the ciphers below `secured_conn` from now on; nothing else may use
    them."""

    def __init__(self, secured_conn: ISecureConn) -> None:
        session: Any = secured_conn
        transport = session.conn  # NoiseTransportReadWriter
        raw = transport.read_writer.read_write_closer  # RawConnection
        self.connection_type: ConnectionType = raw.get_connection_type()
        self._socket: trio.SocketStream = raw.stream.stream
        self.remote_address = remote_address(self._socket)
        protocol = transport.noise_state.noise_protocol
        self._sealing = _Cipher(protocol.cipher_state_encrypt)
        self._opening = _Cipher(protocol.cipher_state_decrypt)
        # What the negotiation of the muxer read past its own end.
        self._early: bytes = session._drain(None)
        self._rest = b""

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
            plaintext = self._open_messages_untrusted(self._rest + data if self._rest else data)
            if plaintext:
                return plaintext

    def _open_messages_untrusted(self, data: bytes | bytearray) -> bytes:
        pieces: list[bytes] = []
        at, view = 0, memoryview(data)
        while len(data) - at >= 2:
            end = at + 2 + ((data[at] << 8) | data[at + 1])
            if end > len(data):
                break
            if end - at - 2 < _TAG_BYTES:
                raise PipeClosed("a Noise message shorter than its tag")
            try:
                pieces.append(self._opening.open(view[at + 2 : end]))
            except InvalidTag as exc:
                raise PipeClosed("a Noise message that does not verify") from exc
            at = end
        self._rest = bytes(view[at:])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def send(self, frames: Sequence[bytes | memoryview]) -> None:
        """Seal `frames` and write them.  Not to be cancelled unless the connection is given up."""
        sealed: list[bytes] = []
        for plaintext in _plaintexts(frames):
            ciphertext = self._sealing.seal(plaintext)
            sealed += (len(ciphertext).to_bytes(2, "big"), ciphertext)
        try:
            await self._socket.send_all(b"".join(sealed))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PipeClosed("the connection was lost") from exc

    def close(self) -> None:
        self._socket.socket.close()


class _Cipher:
    """One direction's key and message counter, taken over from the Noise library.

    Its own calls take `bytes` only and go through three layers for each message.  Noise Protocol
    Framework section 5.1: the nonce counts messages; section 12.3: ChaChaPoly's is 32 zero bits
    and the counter, little-endian.
    """

    def __init__(self, state: Any) -> None:
        if not isinstance(state.cipher.cipher, ChaCha20Poly1305):
            raise TypeError("libp2p's Noise is ChaChaPoly")
        self._aead: ChaCha20Poly1305 = state.cipher.cipher
        self._count: int = state.n
        # Two counters for one key would repeat a nonce: the library's is of no use from now on.
        state.n = _LAST_COUNT

    def seal(self, plaintext: bytes | memoryview) -> bytes:
        return self._aead.encrypt(self._next_nonce(), plaintext, None)

    def open(self, ciphertext: memoryview) -> bytes:
        """Raises InvalidTag."""
        return self._aead.decrypt(self._next_nonce(), ciphertext, None)

    def _next_nonce(self) -> bytes:
        if self._count >= _LAST_COUNT:
            raise PipeClosed("the connection has used up its message numbers")
        nonce = bytes(4) + self._count.to_bytes(8, "little")
        self._count += 1
        return nonce


def _plaintexts(frames: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """`frames` as few full Noise plaintexts; what lies inside one frame is a view, not a copy."""
    run: list[memoryview] = []
    room = MAX_PLAINTEXT_BYTES
    for frame in frames:
        view = memoryview(frame)
        while len(view):
            part, view = view[:room], view[room:]
            run.append(part)
            room -= len(part)
            if not room:
                yield run[0] if len(run) == 1 else b"".join(run)
                run, room = [], MAX_PLAINTEXT_BYTES
    if run:
        yield b"".join(run)


def remote_address(stream: trio.SocketStream) -> tuple[str, int] | None:
    """IP and port of the other end; libp2p's own helper knows no IPv6."""
    try:
        name = stream.socket.getpeername()
    except OSError:
        return None
    return str(name[0]).partition("%")[0], int(name[1])
