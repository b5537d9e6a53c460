"""Valid programs and tensor images to start from, small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextgpu_node.graph.export import export
from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_protocol.program import (
    DType,
    Graph,
    Node,
    ProgramSpec,
    Ref,
    Symbol,
    TensorSpec,
    encode_program,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mask = torch.ones(x.shape[1], x.shape[1]).tril() > 0
        return nn.functional.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=mask
        )


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.MaxPool2d(2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).flatten(1).softmax(-1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(self.embedding(tokens))
        best = out.topk(2, -1)
        return torch.gather(out, -1, best.indices).cumsum(1)


def scan() -> ProgramSpec:
    """A program with a carry, all three graphs and a stop."""
    total = TensorSpec("total", "int64", (2,))
    return ProgramSpec(
        min_table_version=1,
        carry=(total,),
        xs=(TensorSpec("x", "int64", ("n", 2)),),
        ys=(TensorSpec("y", "int64", (None, 2)), TensorSpec("done", "bool", ())),
        symbols=(Symbol("n", 1, 64),),
        stop=1,
        checkpoint_s=30,
        step=Graph(
            (
                Node("aten.sum.dim_IntList", (Ref(1), (0,)), (), "t"),
                Node("aten.add.Tensor", (Ref(0), Ref(2)), (), "t"),
                Node("aten.sym_size.int", (Ref(1), 0), (), "i"),
                Node("sym.mul", (Ref(4), 2), (), "i"),
                Node("aten.expand.default", (Ref(3), (Ref(5), 2)), (), "t"),
                Node("aten.gt.Scalar", (Ref(3), 100), (), "t"),
                Node("aten.all.default", (Ref(7),), (), "t"),
            ),
            (3, 6, 8),
        ),
        init=Graph((Node("aten.zeros.default", ((2,),), (("dtype", DType("int64")),), "t"),), (0,)),
        finish=Graph((Node("aten.neg.default", (Ref(0),), (), "t"),), (1,)),
        finish_ys=(total,),
    )


def programs() -> Iterator[bytes]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    yield encode_program(export(Attention(), (x,), dynamic={"x": {1: "length"}}).spec)
    yield encode_program(export(Images().eval(), (torch.randn(2, 3, 8, 8),)).spec)
    yield encode_program(export(Tokens().eval(), (torch.randint(0, 9, (2, 6)),)).spec)
    yield encode_program(scan())


def images() -> Iterator[bytes]:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0, dtype=torch.int8), "c": torch.tensor(1)}
    yield b"".join(bytes(piece) for piece in encode_tensors(tensors))
