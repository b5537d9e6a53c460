from __future__ import annotations

import pytest

from tests.support.interop import node_command


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The command line of the second implementation; its subcommand and arguments follow."""
    return node_command()
