"""docs/training-and-generation.md: its blocks run, in order."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "training-and-generation.md"


def test_the_blocks_of_the_page_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
