"""The trio-native client: an input stream that stays open, answered step by step."""

from collections.abc import AsyncIterator

import torch
import trio

from nextgpu_node.sdk import export, open_client
from nextgpu_node.sdk.events import StepResult


async def main() -> None:
    program = export(lambda x: x * 2, (torch.ones(1),))
    (name,) = (spec.name for spec in program.spec.xs)
    answered, answers = trio.open_memory_channel[torch.Tensor](1)

    async def steps() -> AsyncIterator[dict[str, torch.Tensor]]:
        x = torch.ones(1)
        for _ in range(4):
            yield {name: x}
            x = await answers.receive()  # the next input is the last result

    async with open_client() as client, client.run(program, steps()) as events:
        async for event in events:
            if isinstance(event, StepResult):
                print("step", event.index, event.tensors["output"].item())
                answered.send_nowait(event.tensors["output"])


if __name__ == "__main__":
    trio.run(main)
