"""A worker module that keeps its one-time key where only the machine's root can look for it.

It makes the key as the real worker does, says HELLO with the public half and leaves the secret one
in its scratch: a scanner reads it there and looks for it in the memory of others.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from nextgpu_protocol.framing import FrameKind, encode_frame
from nextgpu_protocol.sealing import KeyPair


def preload() -> str:
    KeyPair(bytes(32))
    return "keys"


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    secret = os.urandom(32)
    key_pair = KeyPair(secret)
    Path("/tmp/secret").write_bytes(secret)
    sock.sendall(encode_frame(FrameKind.HELLO, key_pair.public))
    while sock.recv(65536):
        continue
