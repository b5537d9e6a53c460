"""Backward passes as rows: arguments that do not belong together never reach the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nextgpu_node.graph.checked_kernels import CHECKED_KERNELS
from nextgpu_node.graph.link import link_graph_untrusted
from nextgpu_node.graph.plan import make_plan_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program import TENSOR, UNUSED, Graph, Node, Ref
from tests.support.rows import Case, case_of

OPERATORS = sorted(str(op) for op in CHECKED_KERNELS)


def plan(case: Case) -> None:
    """Plan one call of the row, its tensors on the meta device."""
    inputs: list[torch.Tensor] = []

    def argument(value):
        if isinstance(value, torch.Tensor):
            inputs.append(value.to("meta"))
            return Ref(len(inputs) - 1)
        return tuple(value) if isinstance(value, list) else value

    args = tuple(argument(value) for value in case.args)
    first = len(inputs)
    made = [one is not None for one in _results(case)]
    node = Node(case.row.op, args, (), "".join(TENSOR if one else UNUSED for one in made))
    outputs = tuple(first + at for at, one in enumerate(made) if one)
    linked = link_graph_untrusted("step", Graph((node,), outputs), first)
    make_plan_untrusted(linked, inputs, device=torch.device("cpu"), max_live_bytes=2**30)


def _results(case: Case) -> list[torch.Tensor | None]:
    result = case_of(case.row.op).run()
    return list(result)


def lies(case: Case) -> Iterator[Case]:
    """The call with one tensor of another shape or dtype: longer, shorter, or halved numbers."""
    for at, value in enumerate(case.args):
        if isinstance(value, torch.Tensor):
            changed = (
                torch.cat((value, value), -1), value[..., :1], value.half(), value[None],
            )  # fmt: skip
            for other in changed:
                if other.shape == value.shape and other.dtype is value.dtype:
                    continue
                yield Case(case.row, (*case.args[:at], other, *case.args[at + 1 :]))


# How many of the lies are none: a tensor that alone decides dtype or size may be of another one.
_HARMLESS = {
    "aten._adaptive_avg_pool2d_backward.default": 4,
    "aten._adaptive_avg_pool3d_backward.default": 4,
    **{name: 1 for name in OPERATORS if "upsample" in name},
    **{name: 2 for name in OPERATORS if "grid_sampler" in name},
}


def refused(case: Case) -> bool:
    try:
        plan(case)
    except RemoteProtocolError as exc:
        return exc.code is ErrorCode.BAD_PROGRAM
    return False


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_that_do_not_belong_together_are_refused_before_the_call(name):
    case = case_of(name)
    plan(case)
    believed = [lie for lie in lies(case) if not refused(lie)]
    assert len(believed) == _HARMLESS.get(name, 0)
