"""Same program, same inputs, same device class: same bytes, every time.

Where it holds: within a process, from process to process, and from one number of threads to
another for the models here.  Nothing promises the last: torch may split a sum differently for
another number of threads, and does for some sizes.
"""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine


class Mixed(nn.Module):
    """What sums in more than one way: products, convolution, normalisation, scatter, sorting."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("segments", torch.arange(24) % 5)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens)
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x, _ = self.lstm(self.norm(x))
        y = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        sums = torch.zeros(2, 5, 16).index_add(1, self.segments, y)
        return sums.softmax(-1), y.cumsum(1).sort(-1).values


def digest(tensors) -> str:
    state = hashlib.sha256()
    for tensor in tensors.values():
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A program file and the digest of its outputs in this process."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (2, 24))
    program = export(Mixed().eval(), (tokens,))
    path = tmp_path_factory.mktemp("program") / "mixed.ngp"
    program.save(path)
    return path, tokens, digest(make_machine(program).step({"tokens": tokens}).ys)


def test_every_step_of_one_machine_and_of_another_gives_the_same_bytes(saved):
    path, tokens, expected = saved
    for _ in range(2):
        machine = make_machine(Program.load(path))
        assert {digest(machine.step({"tokens": tokens}).ys) for _ in range(3)} == {expected}


CODE = """
import sys, torch
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.local import make_machine
from tests.unit.graph.test_determinism import digest
torch.set_num_threads(int(sys.argv[2]))
tokens = torch.tensor(eval(sys.argv[3]))
print(digest(make_machine(Program.load(sys.argv[1])).step({"tokens": tokens}).ys))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_another_process_gives_the_same_bytes(saved, threads):
    path, tokens, expected = saved
    # Another hash seed and a poisoned allocator: nothing may depend on either.
    environment = os.environ | {"PYTHONHASHSEED": "7", "MALLOC_PERTURB_": "165"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, path, str(threads), str(tokens.tolist())],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
