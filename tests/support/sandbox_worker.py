"""A worker module without torch: HELLO, then an echo of each DATA frame until END."""

from __future__ import annotations

import os
import socket

from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame


def preload() -> str:
    return "echo 1.0"


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    sock.sendall(encode_frame(FrameKind.HELLO, os.urandom(32)))
    decoder = FrameDecoder()
    while data := sock.recv(65536):
        decoder.feed(data)
        for kind, body in decoder:
            if kind is FrameKind.END:
                return
            sock.sendall(encode_frame(kind, body))
