"""Every file in examples/ runs as it stands, against real nodes."""

from __future__ import annotations

import asyncio
import inspect
import runpy
from pathlib import Path

import pytest
import trio

from tests.support.nodes import Trio

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "events_in_trio.py": "step 3 16.0",
    "from_asyncio.py": "sums: [1.0, 1.0, 1.0, 1.0, 1.0]",
    "map_over_peers.py": "20 batches, as here: True",
    "one_unit_and_its_receipt.py": "receipt: done",
    "other_schedulers.py": "equal: True",
}


def test_every_example_is_run() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_what_it_should(
    nodes: Trio, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "other_schedulers.py":
        pytest.importorskip("dask")
        pytest.importorskip("joblib")
    monkeypatch.setenv("NEXTGPU_HOME", str(nodes.submitter.home))
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    if not inspect.iscoroutinefunction(main):
        main()
    elif name == "from_asyncio.py":
        asyncio.run(main())
    else:
        trio.run(main)
    assert SAYS[name] in capsys.readouterr().out
