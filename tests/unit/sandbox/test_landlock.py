from __future__ import annotations

import pytest

from nextgpu_node.sandbox import landlock


@pytest.mark.parametrize(
    ("abi", "file_rights", "network", "scoped"),
    [(1, 13, 0, 0), (2, 14, 0, 0), (3, 15, 0, 0), (4, 15, 3, 0), (5, 16, 3, 0), (7, 16, 3, 3)],
)
def test_every_right_that_the_kernel_knows_is_handled(
    abi: int, file_rights: int, network: int, scoped: int
) -> None:
    assert landlock.handled(abi) == (2**file_rights - 1, network, scoped)


def test_no_access_lets_a_worker_run_a_file_or_make_a_device() -> None:
    execute, make_char, make_sock, make_fifo, make_block = 1, 1 << 6, 1 << 9, 1 << 10, 1 << 11
    for rights in landlock.RIGHTS.values():
        assert not rights & (execute | make_char | make_sock | make_fifo | make_block)


def test_readers_may_not_write() -> None:
    assert landlock.RIGHTS["read"] == landlock.READ_FILE | landlock.READ_DIR
