"""A worker that writes a text over 64 MiB of its card and then waits for its end."""

from __future__ import annotations

import os
import socket
from typing import Final

import torch

from nextgpu_protocol.framing import FrameKind, encode_frame

TEXT: Final = b"canary on the card 71c5e0d94ab2"
_COUNT: Final = (64 << 20) // len(TEXT)


def preload() -> str:
    return f"torch {torch.__version__}"


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    sock.sendall(encode_frame(FrameKind.HELLO, os.urandom(32)))
    sock.recv(65536)
    text = torch.tensor(list(TEXT), dtype=torch.uint8).repeat(_COUNT)
    kept = text.to(str(limits["device"]))
    assert int(kept[0]) == TEXT[0]
    sock.sendall(encode_frame(FrameKind.DATA, b"written"))
    sock.recv(65536)
