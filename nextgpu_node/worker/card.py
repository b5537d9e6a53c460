"""A worker that serves no unit: it clears the free memory of a card, or looks whether it is clear.

The wipe after a unit on a card starts two, one after the other, under the walls that the unit had:
what one has written, another process must not find.  Drivers clear memory before they give it to
another process; this does not rely on it.  Not verified on a card.

    DATA "clear"   zeros over all that is free
    DATA "look"    nothing is written
    answer         DATA u64 bytes ‖ u64 of them that did not read as 0
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Final

import torch

from nextgpu_node.graph.card_memory import take_free
from nextgpu_node.worker.channel import Channel, ChannelClosed
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.framing import FrameKind

ANSWER: Final = struct.Struct(">QQ")
# The owner's own programs, a desktop among them, go on meanwhile.
SPARE_BYTES: Final = 256 << 20
_PART_BYTES: Final = 32 << 20
_KEY_BYTES: Final = 32


def preload() -> str:
    return f"torch {torch.__version__}"


def serve(sock: socket.socket, limits: Mapping[str, int | str]) -> int:
    """Do what the first frame says and answer."""
    channel = Channel(sock)
    try:
        # It holds no key: nothing is sealed to it.
        channel.send_hello(os.urandom(_KEY_BYTES))
        order = channel.expect_untrusted(FrameKind.DATA)
        blocks = take_free(torch.device(str(limits["device"])), spare_bytes=SPARE_BYTES)
        if order == b"clear":
            clear(blocks)
        channel.send(FrameKind.DATA, ANSWER.pack(*count_marked(blocks)))
    except (ChannelClosed, RemoteProtocolError):
        return 1
    return 0


def clear(blocks: Iterable[torch.Tensor]) -> None:
    for block in blocks:
        block.zero_()


def count_marked(blocks: Iterable[torch.Tensor]) -> tuple[int, int]:
    """(bytes, how many of them are not 0)."""
    sizes, marked = 0, 0
    for block in blocks:
        sizes += block.numel()
        # In parts: the comparison makes as many bytes again.
        for start in range(0, block.numel(), _PART_BYTES):
            marked += int(torch.count_nonzero(block[start : start + _PART_BYTES]))
    return sizes, marked
