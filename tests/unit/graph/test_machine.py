"""What a machine refuses, what it bounds, and when it lets go of memory."""

import dataclasses
import tracemalloc
import weakref

import pytest
import torch

from nextgpu_node.graph import plan
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine
from nextgpu_node.graph.machine import Machine
from nextgpu_node.graph.optable import TABLE_VERSION
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.program import (
    DType,
    Graph,
    MemoryFormat,
    Node,
    ProgramSpec,
    Ref,
    Symbol,
    TensorSpec,
    decode_program_untrusted,
    encode_program,
)

MEGABYTE = 10**6
X = TensorSpec("x", "float32", (4, 6))
ANY = TensorSpec("y", "float32", (None, None))


def program(*nodes, outputs=None, xs=(X,), ys=(ANY,), **more) -> ProgramSpec:
    """A program of `nodes` on x, which gives the last value."""
    values = len(xs) + sum(len(node.outputs) for node in nodes)
    graph = Graph(nodes, outputs or (values - 1,))
    spec = ProgramSpec(min_table_version=1, step=graph, xs=xs, ys=ys, **more)
    return decode_program_untrusted(encode_program(spec))


def node(op, *args, outputs="t", **kwargs) -> Node:
    return Node(op, args, tuple(sorted(kwargs.items())), outputs)


def refusal(spec, xs=None, *, max_live_bytes=MEGABYTE) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        Machine(spec, device="cpu", max_live_bytes=max_live_bytes).step(
            {"x": torch.ones(4, 6)} if xs is None else xs
        )
    return caught.value


x = Ref(0)
REFUSED_CALLS = {
    "an operator that reads files": (node("aten.from_file.default"), ErrorCode.UNKNOWN_OPERATOR),
    "foreign memory": (
        node("aten.as_strided.default", x, (10**6,), (1,)),
        ErrorCode.UNKNOWN_OPERATOR,
    ),
    "uninitialised memory": (
        node("aten.empty.memory_format", (4,)),
        ErrorCode.UNKNOWN_OPERATOR,
    ),
    "a write in place": (node("aten.add_.Tensor", x, x), ErrorCode.UNKNOWN_OPERATOR),
    "random numbers": (node("aten.rand.default", (4,)), ErrorCode.UNKNOWN_OPERATOR),
    "a size from a value": (node("aten.nonzero.default", x), ErrorCode.UNKNOWN_OPERATOR),
    "another namespace": (node("prims.device_put.default", x), ErrorCode.UNKNOWN_OPERATOR),
    "an argument too many": (node("aten.relu.default", x, 1), ErrorCode.BAD_PROGRAM),
    "an argument too few": (node("aten.linear.default", x), ErrorCode.BAD_PROGRAM),
    "an argument twice": (node("aten.relu.default", x, self=x), ErrorCode.BAD_PROGRAM),
    "an unknown keyword": (node("aten.relu.default", x, inplace=True), ErrorCode.BAD_PROGRAM),
    "none for a tensor": (node("aten.relu.default", None), ErrorCode.BAD_PROGRAM),
    "a tensor for a size": (node("aten.sum.dim_IntList", x, (x,)), ErrorCode.BAD_PROGRAM),
    "a float for an integer": (node("aten.select.int", x, 0.0, 1), ErrorCode.BAD_PROGRAM),
    "a boolean for an integer": (node("aten.select.int", x, True, 1), ErrorCode.BAD_PROGRAM),
    "an integer for a boolean": (
        node("aten.sum.dim_IntList", x, (0,), 1),
        ErrorCode.BAD_PROGRAM,
    ),
    "a dtype for a number": (node("aten.add.Scalar", x, DType("int8")), ErrorCode.BAD_PROGRAM),
    "a number for a dtype": (node("aten.sum.default", x, dtype=6), ErrorCode.BAD_PROGRAM),
    "a number for a memory format": (
        node("aten.clone.default", x, memory_format=0),
        ErrorCode.BAD_PROGRAM,
    ),
    "a mode of another operator": (
        node("aten.gelu.default", x, approximate="sum"),
        ErrorCode.BAD_PROGRAM,
    ),
    "a device": (node("aten.zeros.default", (2,), device=0), ErrorCode.BAD_PROGRAM),
    "pinned memory": (node("aten.zeros.default", (2,), pin_memory=True), ErrorCode.BAD_PROGRAM),
    "training mode": (node("aten.dropout.default", x, 0.5, True), ErrorCode.BAD_PROGRAM),
    "training mode as a number": (node("aten.dropout.default", x, 0.5, 0), ErrorCode.BAD_PROGRAM),
    "random attention": (
        node("aten.scaled_dot_product_attention.default", x, x, x, None, 0.5),
        ErrorCode.BAD_PROGRAM,
    ),
    "two outputs of one": (node("aten.relu.default", x, outputs="tt"), ErrorCode.BAD_PROGRAM),
    "one output of two": (node("aten.topk.default", x, 1), ErrorCode.BAD_PROGRAM),
    "a number that is a tensor": (node("aten.relu.default", x, outputs="i"), ErrorCode.BAD_PROGRAM),
    "shapes that do not fit": (node("aten.mm.default", x, x), ErrorCode.BAD_PROGRAM),
    "a negative size": (node("aten.zeros.default", (-4,)), ErrorCode.BAD_PROGRAM),
    "a dimension that is not there": (node("aten.select.int", x, 7, 0), ErrorCode.BAD_PROGRAM),
    "a boolean mask as an index": (
        node("aten.index.Tensor", x, (Ref(0),)),
        ErrorCode.BAD_PROGRAM,
    ),
    "more pieces than declared": (node("aten.unbind.int", x), ErrorCode.BAD_PROGRAM),
    "pieces of no size": (node("aten.split.Tensor", x, 0), ErrorCode.BAD_PROGRAM),
    "billions of pieces": (
        node("aten.tensor_split.sections", x, 2**40, outputs="tt"),
        ErrorCode.BAD_PROGRAM,
    ),
    "a 100 GB tensor": (node("aten.zeros.default", (25 * 10**9,)), ErrorCode.OVER_LIMIT),
    "an overflowing size": (
        node("aten.zeros.default", (2**40, 2**40)),
        ErrorCode.BAD_PROGRAM,
    ),
    "an expanded view": (
        node("aten.expand.default", x, (10**9, 4, 6)),
        ErrorCode.OVER_LIMIT,
    ),
    "a huge range": (node("aten.arange.default", 10**12), ErrorCode.OVER_LIMIT),
    "a repetition": (node("aten.repeat.default", x, (10**5, 10**5)), ErrorCode.OVER_LIMIT),
    "padding": (node("aten.constant_pad_nd.default", x, (0, 10**9)), ErrorCode.OVER_LIMIT),
    "a product of sizes": (node("aten.outer.default", Ref(0), Ref(0)), ErrorCode.BAD_PROGRAM),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_a_call_outside_the_table_is_refused(name):
    call, code = REFUSED_CALLS[name]
    if "i" in call.outputs:
        spec = program(call, outputs=(0,))
    elif name == "a boolean mask as an index":
        mask = node("aten.gt.Scalar", x, 0)
        spec = program(mask, node("aten.index.Tensor", x, (Ref(1),)))
    else:
        spec = program(call)
    error = refusal(spec)
    assert error.code is code, error
    assert call.op in error.detail
    assert "graphs.step.nodes[" in error.detail


def test_many_small_values_together_are_bounded():
    doubling = [node("aten.cat.default", (Ref(at), Ref(at))) for at in range(40)]
    assert refusal(program(*doubling)).code is ErrorCode.OVER_LIMIT


def test_pieces_are_counted_before_they_are_made():
    spec = program(
        node("aten.zeros.default", (900_000,), dtype=DType("int8")),
        node("aten.unbind.int", Ref(1), outputs="tt"),
    )
    tracemalloc.start()
    error = refusal(spec)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "2 outputs are declared, 900000 would come" in error.detail
    assert peak < 1_000_000


def test_size_arithmetic_can_not_run_away():
    size = [node("aten.sym_size.int", x, 0, outputs="i")]
    powers = [node("sym.mul", Ref(at), Ref(at), outputs="i") for at in range(1, 9)]
    spec = program(*size, *powers, outputs=(0,))
    assert refusal(spec).code is ErrorCode.BAD_PROGRAM
    for op, left, right in (("sym.pow", 2, 10**9), ("sym.floordiv", 1, 0), ("sym.mod", 1, 0)):
        spec = program(node(op, left, right, outputs="i"), outputs=(0,))
        assert refusal(spec).code is ErrorCode.BAD_PROGRAM


def test_a_number_of_another_kind_than_declared_is_refused():
    spec = program(node("sym.add", 1, 0.5, outputs="i"), outputs=(0,))
    assert refusal(spec).code is ErrorCode.BAD_PROGRAM


@pytest.mark.parametrize(
    "y", [TensorSpec("y", "float16", (4, 6)), TensorSpec("y", "float32", (4, 7))]
)
def test_outputs_are_as_declared(y):
    assert refusal(program(node("aten.relu.default", x), ys=(y,))).code is ErrorCode.BAD_PROGRAM


def test_a_newer_table_is_needed():
    spec = dataclasses.replace(program(outputs=(0,)), min_table_version=TABLE_VERSION + 1)
    assert refusal(spec).code is ErrorCode.OLD_TABLE


BAD_INPUTS = {
    "none": {},
    "another name": {"z": torch.ones(4, 6)},
    "one too many": {"x": torch.ones(4, 6), "z": torch.ones(1)},
    "another dtype": {"x": torch.ones(4, 6, dtype=torch.float64)},
    "another shape": {"x": torch.ones(6, 4)},
    "fewer dimensions": {"x": torch.ones(4)},
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_do_not_match_are_refused(name):
    assert refusal(program(outputs=(0,)), BAD_INPUTS[name]).code is ErrorCode.BAD_TENSORS


def test_symbols_are_bound_and_kept_in_range():
    xs = (TensorSpec("x", "float32", ("n", "n")),)
    spec = program(outputs=(0,), xs=xs, symbols=(Symbol("n", 2, 3),))
    assert refusal(spec, {"x": torch.ones(2, 3)}).code is ErrorCode.BAD_TENSORS
    assert refusal(spec, {"x": torch.ones(4, 4)}).code is ErrorCode.BAD_TENSORS
    machine = Machine(spec, device="cpu", max_live_bytes=MEGABYTE)
    assert machine.step({"x": torch.ones(3, 3)}).ys["y"].shape == (3, 3)


def test_steps_are_bounded():
    machine = Machine(program(outputs=(0,)), device="cpu", max_live_bytes=MEGABYTE, max_steps=2)
    for _ in range(2):
        machine.step({"x": torch.ones(4, 6)})
    with pytest.raises(RemoteProtocolError, match="more than 2 steps"):
        machine.step({"x": torch.ones(4, 6)})


def test_a_failing_kernel_tells_no_values():
    index = TensorSpec("index", "int64", (1,))
    spec = program(node("aten.index_select.default", x, 0, Ref(1)), xs=(X, index))
    error = refusal(spec, {"x": torch.ones(4, 6), "index": torch.tensor([123_456])})
    assert error.code is ErrorCode.STEP_FAILED
    assert "123456" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_constants_and_carry_must_be_loaded_first():
    spec = program(outputs=(0,), xs=(X,), constants=(TensorSpec("w", "float32", (1, 1)),))
    with pytest.raises(LocalProtocolError, match="constants"):
        Machine(spec, device="cpu", max_live_bytes=MEGABYTE).step({"x": torch.ones(4, 6)})


def test_init_makes_the_carry_and_finish_reads_it():
    total = TensorSpec("total", "float32", (4, 6))
    spec = program(
        node("aten.add.Tensor", Ref(0), Ref(1)),
        outputs=(2, 2),
        carry=(total,),
        ys=(total,),
        init=Graph((node("aten.ones.default", (4, 6)),), (0,)),
        finish=Graph((node("aten.sum.default", Ref(0)),), (1,)),
        finish_ys=(TensorSpec("sum", "float32", ()),),
    )
    machine = Machine(spec, device="cpu", max_live_bytes=MEGABYTE)
    machine.init_carry()
    machine.step({"x": torch.ones(4, 6)})
    assert machine.finish()["sum"].item() == 48.0


def test_a_carry_fixes_its_symbols_for_the_whole_scan():
    state = TensorSpec("state", "float32", ("n",))
    spec = program(
        node("aten.add.Tensor", Ref(0), Ref(1)),
        outputs=(2, 2),
        carry=(state,),
        xs=(TensorSpec("x", "float32", ("n",)),),
        ys=(state,),
        symbols=(Symbol("n", 1, 100),),
    )
    machine = Machine(spec, device="cpu", max_live_bytes=MEGABYTE)
    machine.load_carry({"state": torch.zeros(3)})
    assert machine.step({"x": torch.ones(3)}).ys["state"].tolist() == [1, 1, 1]
    with pytest.raises(RemoteProtocolError, match="n is 3 elsewhere"):
        machine.step({"x": torch.ones(4)})


def test_a_carry_does_not_grow_from_step_to_step():
    """A carry that is a view of something larger must not keep that alive."""
    state = TensorSpec("state", "float32", (2,))
    spec = program(
        node("aten.slice.Tensor", Ref(1), 0, 0, 2),
        outputs=(2, 2),
        carry=(state,),
        xs=(TensorSpec("x", "float32", (1000,)),),
        ys=(state,),
    )
    machine = Machine(spec, device="cpu", max_live_bytes=MEGABYTE)
    machine.load_carry({"state": torch.zeros(2)})
    machine.step({"x": torch.ones(1000)})
    assert machine.carry()["state"].untyped_storage().nbytes() == 8


def test_values_are_freed_after_their_last_reader(monkeypatch):
    """Ten values of 1 MB in a row, two of which are ever alive."""
    steps = [node("aten.neg.default", Ref(at)) for at in range(10)]
    big = TensorSpec("x", "float32", (250, 1000))
    spec = program(*steps, xs=(big,), ys=(big,))
    machine = Machine(spec, device="cpu", max_live_bytes=100 * MEGABYTE)
    alive: list[weakref.ref] = []
    most = 0

    def watched(function):
        def call(*args):
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            result = function(*args)
            alive.append(weakref.ref(result))
            return result

        return call

    real = plan._function
    monkeypatch.setattr(plan, "_function", lambda row: watched(real(row)))
    machine.step({"x": torch.ones(250, 1000)})
    assert most == 1
    # The input, a value and its successor.
    assert machine.peak_bytes == 3 * MEGABYTE


def test_sizes_read_last_by_arithmetic_still_free_their_tensor():
    big = TensorSpec("x", "float32", (250, 1000))
    spec = program(
        node("aten.neg.default", Ref(0)),
        node("aten.sym_size.int", Ref(1), 0, outputs="i"),
        node("aten.ones.default", (Ref(2), 1000)),
        xs=(big,),
    )
    machine = Machine(spec, device="cpu", max_live_bytes=100 * MEGABYTE)
    machine.step({"x": torch.ones(250, 1000)})
    assert machine.peak_bytes == 2 * MEGABYTE
    (only,) = machine._plans.values()
    assert 1 in only.instructions[-1][-1]


def test_a_plan_is_made_once_for_each_shape(monkeypatch):
    runs = []
    original = plan._Planner.plan
    monkeypatch.setattr(plan._Planner, "plan", lambda self: runs.append(1) or original(self))
    machine = make_machine(export(lambda x: x * 2, (torch.ones(2, 2),), dynamic={"x": {0: "n"}}))
    for rows in (2, 3, 2, 3, 3):
        machine.step({"x": torch.ones(rows, 2)})
    assert len(runs) == 2


def test_every_step_gives_the_same_bytes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    machine = make_machine(export(model, (torch.randn(3, 16),)))
    xs = {"input": torch.randn(3, 16)}
    first, second = machine.step(xs).ys, machine.step(xs).ys
    assert torch.equal(first["output"], second["output"])


def test_memory_formats_reach_the_kernel():
    image = TensorSpec("x", "float32", (1, 2, 3, 4))
    call = node("aten.clone.default", x, memory_format=MemoryFormat("channels_last"))
    spec = program(call, xs=(image,), ys=(image,))
    machine = Machine(spec, device="cpu", max_live_bytes=MEGABYTE)
    result = machine.step({"x": torch.randn(1, 2, 3, 4)}).ys["x"]
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RuntimeError("the secret is 42"), ErrorCode.STEP_FAILED),
        (ZeroDivisionError("42"), ErrorCode.STEP_FAILED),
        (MemoryError("42"), ErrorCode.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("42"), ErrorCode.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 42"), ErrorCode.OUT_OF_MEMORY),
    ],
)
def test_whatever_a_kernel_raises_names_the_node_and_no_value(monkeypatch, raised, code):
    def failing(*args):
        raise raised

    monkeypatch.setattr(plan, "_function", lambda row: failing)
    error = refusal(program(node("aten.relu.default", x)))
    assert error.code is code
    assert error.detail == f"graphs.step.nodes[0] aten.relu.default: {type(raised).__name__}"
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_what_fails_outside_of_the_kernels_names_its_place(monkeypatch):
    machine = Machine(program(node("aten.relu.default", x)), device="cpu", max_live_bytes=MEGABYTE)

    class Lost(torch.Tensor):
        def detach(self):
            raise torch.OutOfMemoryError("42")

    with pytest.raises(RemoteProtocolError) as caught:
        machine.step({"x": torch.ones(4, 6).as_subclass(Lost)})
    assert caught.value.code is ErrorCode.OUT_OF_MEMORY
    assert caught.value.detail == "x: OutOfMemoryError"


def test_the_carry_is_let_go_as_it_is_read():
    """A state of ten parts, each replaced in turn: never all of both are alive."""
    parts = [TensorSpec(f"p{at}", "float32", (250, 100)) for at in range(10)]
    negations = [node("aten.neg.default", Ref(at)) for at in range(10)]
    spec = program(*negations, xs=(), ys=(), carry=tuple(parts), outputs=tuple(range(10, 20)))
    machine = Machine(spec, device="cpu", max_live_bytes=100 * MEGABYTE)
    machine.load_carry({part.name: torch.ones(250, 100) for part in parts})
    machine.step({})
    assert machine.peak_bytes == 11 * parts[0].nbytes()
    machine.step({})
    assert torch.equal(machine.carry()["p3"], torch.ones(250, 100))


def test_inputs_given_up_go_with_their_last_reader(monkeypatch):
    spec = program(
        node("aten.neg.default", x),
        node("aten.neg.default", Ref(1)),
        node("aten.abs.default", Ref(2)),
    )
    machine = Machine(spec, device="cpu", max_live_bytes=MEGABYTE)
    given = {"x": torch.ones(4, 6)}
    storage = weakref.ref(given["x"].untyped_storage())
    alive = []
    real = plan._function

    def watching(row):
        function = real(row)
        return lambda *args: (alive.append(storage() is not None), function(*args))[1]

    monkeypatch.setattr(plan, "_function", watching)
    machine.step_and_release(given)
    assert given == {}
    assert alive[0]
    assert not alive[2]
