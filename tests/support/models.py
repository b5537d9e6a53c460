"""Small language models with random weights, from their configuration classes."""

from __future__ import annotations

from typing import Any

import torch


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A 2-layer Llama with a vocabulary of 99."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_decoder(**changes))).eval()


def tiny_qwen2(seed: int = 0, **changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**_decoder(**changes))).eval()


def tiny_mistral(seed: int = 0, **changes: Any) -> Any:
    """With a sliding window of 8 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**_decoder(sliding_window=8, **changes))).eval()


def tiny_gpt2(seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def _decoder(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }
