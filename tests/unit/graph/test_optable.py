"""The operator table against what torch says about each operator."""

import torch
from torch._ops import OpOverload

from nextgpu_node.graph.optable import TABLE, Kind

REVIEWED = {
    "Tensor": {Kind.TENSOR},
    "List[Tensor]": {Kind.TENSORS},
    "List[Optional[Tensor]]": {Kind.MAYBE_TENSORS},
    "int": {Kind.INT},
    "List[int]": {Kind.INTS},
    "float": {Kind.FLOAT},
    "List[float]": {Kind.FLOATS},
    "bool": {Kind.BOOL, Kind.ABSENT},
    "List[bool]": {Kind.BOOLS},
    "number": {Kind.NUMBER},
    "ScalarType": {Kind.DTYPE},
    "MemoryFormat": {Kind.MEMORY_FORMAT},
    "str": {Kind.TEXT, Kind.ABSENT},
    "Device": {Kind.ABSENT},
    "Layout": {Kind.ABSENT},
}
FORBIDDEN_WORDS = ("from_file", "as_strided", "set_", "resize", "empty", "storage", "rand", "item")
FORBIDDEN_TAGS = {
    torch.Tag.data_dependent_output,
    torch.Tag.inplace_view,
}
# Refused by its shape run where it would depend on values.
DYNAMIC = {"aten.index.Tensor"}


def overloads() -> list[OpOverload]:
    return [row.call for row in TABLE.values() if isinstance(row.call, OpOverload)]


def test_every_argument_is_of_a_reviewed_kind():
    for op in overloads():
        parameters = TABLE[str(op)].parameters
        assert len(parameters) == len(op._schema.arguments)
        for argument, parameter in zip(op._schema.arguments, parameters, strict=True):
            bare = str(argument.real_type).removeprefix("Optional[")
            bare = bare.removesuffix("]") if bare != str(argument.real_type) else bare
            assert parameter.kind in REVIEWED[bare], f"{op} {argument.name}"
            assert parameter.kind is not Kind.TEXT or parameter.choices, f"{op} {argument.name}"


def test_no_operator_writes_draws_or_reaches_outside():
    for op in overloads():
        assert not op._schema.is_mutable, op
        assert not FORBIDDEN_TAGS.intersection(op.tags), op
        assert torch.Tag.dynamic_output_shape not in op.tags or str(op) in DYNAMIC, op
        assert not any(word in str(op) for word in FORBIDDEN_WORDS), op
        assert op.namespace == "aten"


def test_layers_run_in_inference_mode_only():
    flags = {"training", "train", "use_input_stats", "dropout_p"}
    for op in overloads():
        held = [each for each in TABLE[str(op)].parameters if each.name in flags]
        assert all(parameter.choices in ((False,), (0.0,)) for parameter in held), op
        # What may draw random numbers is in the table only with the flag that forbids it.
        assert held or torch.Tag.nondeterministic_seeded not in op.tags, op


def test_outputs_are_tensors_or_lists_of_tensors():
    for op in overloads():
        types = [str(each.type) for each in op._schema.returns]
        row = TABLE[str(op)]
        if row.returns is None:
            assert types == ["List[Tensor]"], op
            assert row.count is not None
        else:
            assert types == ["Tensor"] * len(row.returns), op


def test_a_row_is_under_its_own_name():
    assert all(row.op == name for name, row in TABLE.items())
    assert all(str(op) in TABLE for op in overloads())


def test_a_grouped_product_clamps_the_ends_of_a_stranger():
    grouped = TABLE["nextgpu.grouped_mm"].call
    tokens, weights = (
        torch.ones(4, 2),
        torch.ones(3, 2, 5) * torch.tensor([1.0, 2, 3])[:, None, None],
    )
    result = grouped(tokens, weights, torch.tensor([1, 3, 3]))
    assert result[:, 0].tolist() == [2, 4, 4, 0]
    for ends in ([-(2**62), 2**62, 0], [9, -1, 2], [3, 1, 4]):
        result = grouped(tokens, weights, torch.tensor(ends))
        assert result.shape == (4, 5)
        assert set(result.unique().tolist()) <= {0, 2, 4, 6}
