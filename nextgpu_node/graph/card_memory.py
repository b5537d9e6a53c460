"""The memory of a card that is free now, as blocks of bytes that nobody has written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

BLOCK_BYTES: Final = 256 << 20
_SMALLEST_BYTES: Final = 1 << 20


def take_free(
    device: torch.device, *, spare_bytes: int, free_bytes: Callable[[], int] | None = None
) -> list[torch.Tensor]:
    """uint8 blocks of all that is free, as they come from the driver, but for `spare_bytes`.

    `free_bytes` tells how much there is; the driver is asked where it is not given.
    """
    ask = free_bytes or (lambda: _free_bytes(device))
    blocks, largest = [], BLOCK_BYTES
    while (size_bytes := min(largest, ask() - spare_bytes)) >= _SMALLEST_BYTES:
        try:
            blocks.append(torch.empty(size_bytes, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            # It is in pieces, or somebody else was faster.
            largest = size_bytes // 2
    return blocks


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)
