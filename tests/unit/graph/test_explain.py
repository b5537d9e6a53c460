"""Errors of an export: the submitter's own line, the operator, and what to do."""

import linecache
from pathlib import Path

import pytest
import torch
from torch import nn

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.explain import Line, describe_place
from nextgpu_node.graph.export import export

HERE = Path(__file__).name


def refusal(model, *args, **more) -> str:
    with pytest.raises(ProgramError) as caught:
        export(model, args, **more)
    return str(caught.value)


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Number(nn.Module):
    def forward(self, x):
        count = int(x.sum().item())
        return x[:count]


class Numpy(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(x.numpy())


class Selects(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Unique(nn.Module):
    def forward(self, x):
        return torch.unique(x)


class Fails(nn.Module):
    def forward(self, x):
        raise KeyError("no such layer")


class Loop(nn.Module):
    def forward(self, x):
        return sum(x[at] for at in range(x.shape[0]))


@pytest.mark.parametrize(
    ("model", "line", "what", "remedy"),
    [
        (Branch(), "if x.sum() > 0:", "branch or loop depends on a tensor's values", "torch.where"),
        (Number(), "count = int(x.sum().item())", "depends on a tensor's values", "Python number"),
        (Numpy(), "torch.from_numpy(x.numpy())", "out of torch", "torch operators"),
        (Selects(), "return x[x > 0]", "aten.index.Tensor", "torch.where or a mask"),
        (Unique(), "return torch.unique(x)", "unique", "fixed shape"),
        (Fails(), 'raise KeyError("no such layer")', "KeyError", "no such layer"),
    ],
)
def test_an_error_names_the_line_what_and_a_remedy(model, line, what, remedy):
    message = refusal(model, torch.ones(4))
    assert f"{HERE}:" in message
    assert line in message
    assert what in message
    assert remedy in message
    assert "site-packages/torch" not in message


def test_an_operator_that_is_not_in_the_table_is_named_with_its_line():
    message = refusal(lambda x: torch.special.hermite_polynomial_h(x, 3), torch.ones(2))
    assert HERE in message
    assert "aten.special_hermite_polynomial_h" in message
    assert "write this line with other operators" in message


def test_a_layer_of_torch_alone_is_named_by_its_place_in_the_model():
    pool = nn.FractionalMaxPool2d(2, output_size=2, _random_samples=torch.rand(1, 1, 2))
    message = refusal(nn.Sequential(nn.ReLU(), pool), torch.ones(1, 1, 6, 6))
    assert "FractionalMaxPool2d" in message
    assert "aten.fractional_max_pool2d" in message


def test_a_size_that_can_not_vary_is_told_with_the_reason():
    message = refusal(Loop(), torch.ones(3, 2), dynamic={"x": {0: "steps"}})
    assert "steps, dimension 0 of x, can not vary" in message
    assert "no Python loop over it" in message
    assert "Leave it out of dynamic" in message


def test_the_submitters_own_line_comes_before_that_of_a_library():
    own = Line("/home/me/model.py", 7, "forward", "y = self.bert(x)")
    library = Line("/venv/lib/python3/site-packages/transformers/bert.py", 40, "forward", "if m:")
    torchs = Line(torch.__file__, 1, "f", "…")
    assert describe_place([own, library, torchs]) == f"{own}\n  reached {library}"
    assert describe_place([own, torchs]) == str(own)
    assert describe_place([library, torchs]) == str(library)
    assert describe_place([torchs], "the layer 0 (ReLU)") == "the layer 0 (ReLU)"


def test_nothing_of_torchs_own_reports_reaches_the_terminal(capfd):
    refusal(Branch(), torch.ones(4))
    assert capfd.readouterr() == ("", "")


def test_what_the_model_prints_is_still_printed(capfd):
    def talks(x):
        print("hello")
        return x * 2

    export(talks, (torch.ones(2),))
    assert "hello" in capfd.readouterr().out


def test_a_model_typed_into_a_shell_is_named_by_its_place():
    source = "def shell(x):\n    return x[x > 0]\n"
    linecache.cache["<console>"] = (len(source), None, source.splitlines(True), "<console>")
    scope: dict = {}
    exec(compile(source, "<console>", "exec"), scope)
    assert "depends on values" in refusal(scope["shell"], torch.ones(2))
