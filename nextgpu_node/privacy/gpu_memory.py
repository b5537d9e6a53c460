"""A process that takes all free memory of every card and looks for texts in it, on the card.

stdin: a JSON list of texts.  stdout: {"found": N, "searched_bytes": N, "cards": N}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES: Final = 256 << 20
_SMALLEST_BYTES: Final = 1 << 20


def main() -> int:
    texts = [text.encode() for text in json.load(sys.stdin)]
    import torch

    found = searched_bytes = 0
    for index in range(torch.cuda.device_count()):
        for block in _take_all(torch.device("cuda", index)):
            searched_bytes += block.numel()
            found += sum(count(block, text) for text in texts)
    report = {"found": found, "searched_bytes": searched_bytes, "cards": torch.cuda.device_count()}
    print(json.dumps(report))
    return 0


def _take_all(device: object) -> list[Tensor]:
    """Blocks as they come from the driver, never written to.  What the comparison needs is left."""
    import torch

    spare = torch.empty(4 * _BLOCK_BYTES, dtype=torch.uint8, device=device)  # type: ignore[call-overload]
    blocks, size_bytes = [], _BLOCK_BYTES
    while size_bytes >= _SMALLEST_BYTES:
        try:
            blocks.append(torch.empty(size_bytes, dtype=torch.uint8, device=device))  # type: ignore[call-overload]
        except torch.OutOfMemoryError:
            size_bytes //= 2
    del spare
    return blocks


def count(block: Tensor, text: Sequence[int]) -> int:
    """How often `text` stands in a block of bytes; it may overlap itself."""
    places = block.numel() - len(text) + 1
    if places <= 0:
        return 0
    equal = block[:places] == text[0]
    for offset, byte in enumerate(text[1:], 1):
        equal &= block[offset : offset + places] == byte
    return int(equal.sum())


if __name__ == "__main__":
    sys.exit(main())
