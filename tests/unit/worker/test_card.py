from __future__ import annotations

import socket
import threading

import pytest
import torch

from nextgpu_node.graph import card_memory
from nextgpu_node.worker import card
from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame

CPU = torch.device("cpu")


def test_all_that_is_free_is_taken_but_what_is_spared() -> None:
    free = 10 << 20
    blocks: list[torch.Tensor] = []

    def free_bytes() -> int:
        return free - sum(block.numel() for block in blocks)

    def take(*args: object, **options: object) -> torch.Tensor:
        blocks.append(torch.zeros(args[0], dtype=torch.uint8))  # type: ignore[call-overload]
        return blocks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_memory, "BLOCK_BYTES", 3 << 20)
        patch.setattr(torch, "empty", take)
        taken = card_memory.take_free(CPU, spare_bytes=2 << 20, free_bytes=free_bytes)
    assert [block.numel() >> 20 for block in taken] == [3, 3, 2]


def test_smaller_blocks_are_taken_where_the_free_memory_is_in_pieces() -> None:
    sizes: list[int] = []

    def take(size: int, **options: object) -> torch.Tensor:
        if size > 3 << 20:
            raise torch.OutOfMemoryError
        sizes.append(size)
        return torch.zeros(1, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", take)
        card_memory.take_free(CPU, spare_bytes=0, free_bytes=lambda: (6 << 20) - sum(sizes))
    assert sum(sizes) == 6 << 20


def test_what_is_not_zero_is_counted_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_PART_BYTES", 3)
    blocks = [torch.tensor([0, 7, 0, 0, 0, 0, 1], dtype=torch.uint8), torch.ones(2).byte()]
    assert card.count_marked(blocks) == (9, 4)
    card.clear(blocks)
    assert card.count_marked(blocks) == (9, 0)


@pytest.mark.parametrize(("order", "left"), [(b"clear", 0), (b"look", 5)])
def test_it_does_what_the_first_frame_says(
    order: bytes, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "take_free", lambda *_, **__: [torch.ones(5).byte()])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=card.serve, args=(theirs, {"device": "cpu"}))
        thread.start()
        ours.sendall(encode_frame(FrameKind.DATA, order))
        thread.join(10)
        decoder = FrameDecoder()
        decoder.feed(ours.recv(4096))
        (hello, key), (kind, body) = decoder
    assert (hello, len(key), kind) == (FrameKind.HELLO, 32, FrameKind.DATA)
    assert card.ANSWER.unpack(body) == (5, left)
