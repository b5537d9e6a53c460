from __future__ import annotations

import subprocess

import pytest

from nextgpu_node.sandbox import syscalls


@pytest.fixture(scope="session", autouse=True)
def kernel_has_the_layers() -> None:
    """Asks the kernel and not our probe: a broken sandbox must fail here, not be skipped."""
    if syscalls.landlock_abi() == 0:
        pytest.skip("this kernel has no Landlock")
    tried = subprocess.run(["unshare", "--user", "--net", "--mount", "true"], capture_output=True)
    if tried.returncode != 0:
        pytest.skip("this kernel refuses namespaces here")
