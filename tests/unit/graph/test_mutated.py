"""Valid programs, changed at random: each runs within what it was promised, or is refused."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextgpu_node.graph.bounds import CHECKS, WORKSPACE
from nextgpu_node.graph.optable import TABLE, Kind
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from tests.fuzz import programs
from tests.fuzz.program_seeds import programs as seeds
from tests.fuzz.row_calls import Call, make_call
from tests.fuzz.rows import Guard, Tally, check
from tests.support.rows import Case, case_of, rows

SEEDS = list(seeds())
NAMES = [row.op for row in rows()]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.integers(0, 2**32), min_size=1, max_size=3))
def test_a_changed_program_is_run_or_refused(data, changes):
    for change in changes:
        data = programs.change_values(data, change) or data
    programs.run(data)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**9))
def test_a_changed_call_keeps_its_promises_or_is_refused(op, number):
    call = make_call(op, number)
    assert check(call, Guard(), Tally()) is None, call.describe()


# ---------------------------------------------------------------- positions out of range

# Rows that take positions as tensors: the argument, and how large a position is out of range.
INDEXED = {
    "aten.embedding.default": "indices",
    "aten.gather.default": "index",
    "aten.index.Tensor": "indices",
    "aten.index_add.default": "index",
    "aten.index_copy.default": "index",
    "aten.index_fill.int_Scalar": "index",
    "aten.index_fill.int_Tensor": "index",
    "aten.index_put.default": "indices",
    "aten.index_reduce.default": "index",
    "aten.index_select.default": "index",
    "aten.put.default": "index",
    "aten.scatter.reduce": "index",
    "aten.scatter.src": "index",
    "aten.scatter.value": "index",
    "aten.scatter.value_reduce": "index",
    "aten.scatter_add.default": "index",
    "aten.scatter_reduce.two": "index",
    "aten.take.default": "index",
    "aten.cross_entropy_loss.default": "target",
    "aten.nll_loss.default": "target",
    "aten.nll_loss2d.default": "target",
    "aten.nll_loss_forward.default": "target",
    "aten.nll_loss_nd.default": "target",
}


# Positions count round and round: none is out of range.
WRAPPED = "aten.take_along_dim.default"


@pytest.mark.parametrize("position", [-(2**62), -1000, 1000, 2**31, 2**62])
@pytest.mark.parametrize("op", INDEXED)
def test_a_position_out_of_range_is_an_error_that_names_the_node(op, position):
    case = case_of(op)
    assert case is not None
    call = call_with(case, INDEXED[op], position)
    plan = call.plan()
    with torch.inference_mode(), pytest.raises(RemoteProtocolError) as caught:
        plan.run(list(call.inputs))
    assert caught.value.code is ErrorCode.STEP_FAILED
    # The node and the kind of error; no message of the kernel, which could hold values.
    assert caught.value.detail in (
        f"graphs.step.nodes[0] {op}: {kind}" for kind in ("IndexError", "RuntimeError")
    )


def test_positions_that_wrap_stay_inside():
    x = torch.arange(12.0).view(3, 4)
    far = torch.tensor([[1001], [-1], [2**62 + 2]])
    assert TABLE[WRAPPED].call(x, far, 1).flatten().tolist() == [1.0, 7.0, 10.0]


def call_with(case: Case, name: str, position: int) -> Call:
    """The valid call of a row with one position of its index replaced."""
    from tests.fuzz.row_calls import _as_call

    def spoilt(value):
        if isinstance(value, list):
            return [spoilt(value[0]), *value[1:]]
        value = value.clone()
        value.view(-1)[0] = position
        return value

    names = [parameter.name for parameter in case.row.parameters]
    at = names.index(name)
    args = (*case.args[:at], spoilt(case.args[at]), *case.args[at + 1 :])
    return _as_call(Case(case.row, args, case.kwargs), None)


def test_every_row_with_positions_is_tried():
    named = {"index", "indices", "target", "sorter", "offsets"}
    found = {
        row.op
        for row in rows()
        if any(
            parameter.name in named and parameter.kind in (Kind.TENSOR, Kind.MAYBE_TENSORS)
            for parameter in row.parameters
        )
    }
    # What is called target elsewhere is data of a loss, not a position.
    losses = {op for op in found if "loss" in op and op not in INDEXED}
    unbounded = {"aten.binary_cross_entropy.default", "aten.kl_div.default"}
    unbounded |= {"aten.binary_cross_entropy_with_logits.default", "aten.searchsorted.Tensor"}
    assert found - losses - unbounded - {"aten.searchsorted.Scalar"} == {*INDEXED, WRAPPED}


def test_every_bound_is_of_a_row():
    # Composed operators are looked through, so what they are made of may have bounds too.
    assert CHECKS.keys() <= TABLE.keys()
    assert all(op in TABLE for op in WORKSPACE)


def test_a_call_can_be_made_again():
    random.seed(1)
    assert make_call("aten.mm.default", 7).describe() == make_call("aten.mm.default", 7).describe()
