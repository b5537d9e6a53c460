"""The names that a submitter's program uses, and what loading them costs."""

import subprocess
import sys

import pytest

import nextgpu_node
import nextgpu_node.sdk
from nextgpu_node.errors import ProgramError

HEAVY = {"torch", "numpy", "trio", "libp2p", "httpx", "safetensors", "transformers", "nacl"}


def imported_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_every_public_name_is_there_under_both_roofs():
    assert set(nextgpu_node.sdk._HOME_OF) == set(nextgpu_node.sdk.__all__)
    for name in nextgpu_node.sdk.__all__:
        assert getattr(nextgpu_node, name) is getattr(nextgpu_node.sdk, name)
        assert name in dir(nextgpu_node)
    assert nextgpu_node.ProgramError is ProgramError


def test_an_unknown_name_is_an_attribute_error():
    for module in (nextgpu_node, nextgpu_node.sdk):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing


@pytest.mark.parametrize("code", ["import nextgpu_node", "import nextgpu_node.sdk"])
def test_importing_the_package_is_light(code):
    assert not imported_by(code) & HEAVY


def test_errors_come_without_torch_and_without_trio():
    assert not imported_by("import nextgpu_node; nextgpu_node.ProgramError") & HEAVY


def test_the_worker_and_the_daemon_load_nothing_more_than_they_did():
    worker = imported_by("import nextgpu_node.graph.machine")
    assert not worker & {"trio", "libp2p", "httpx", "safetensors", "transformers"}
    daemon = imported_by("import nextgpu_node.daemon.main")
    assert not daemon & {"torch", "numpy", "safetensors", "transformers"}
