"""A worker module with torch imported: HELLO, then for each DATA frame one small product."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import torch

from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame


def preload() -> str:
    torch.set_num_threads(1)
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    return f"torch {torch.__version__}"


def reseed() -> None:
    random.seed(os.urandom(32))
    np.random.seed(int.from_bytes(os.urandom(4)))
    # Not torch.manual_seed: it formats a stack trace for CUDA's lazy start, 2 to 18 ms.
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8)) >> 1)


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    sock.sendall(encode_frame(FrameKind.HELLO, os.urandom(32)))
    decoder = FrameDecoder()
    while data := sock.recv(65536):
        decoder.feed(data)
        for kind, _ in decoder:
            if kind is FrameKind.END:
                return
            torch.set_num_threads(2)
            product = torch.rand(64, 64) @ torch.rand(64, 64)
            sock.sendall(encode_frame(FrameKind.DATA, product.numpy().tobytes()[:64]))
