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

# What the comparison needs.
_SPARE_BYTES: Final = 1 << 30


def main() -> int:
    texts = [text.encode() for text in json.load(sys.stdin)]
    import torch

    from nextgpu_node.graph.card_memory import take_free

    found = searched_bytes = 0
    for index in range(torch.cuda.device_count()):
        for block in take_free(torch.device("cuda", index), spare_bytes=_SPARE_BYTES):
            searched_bytes += block.numel()
            found += sum(count(block, text) for text in texts)
    report = {"found": found, "searched_bytes": searched_bytes, "cards": torch.cuda.device_count()}
    print(json.dumps(report))
    return 0


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
