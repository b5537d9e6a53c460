"""Calls on peers from asyncio: the Executor is a concurrent.futures.Executor."""

import asyncio

import torch

from nextgpu_node.sdk import Executor, export


async def main() -> None:
    program = export(lambda x: torch.softmax(x, dim=-1), (torch.ones(4),))
    loop = asyncio.get_running_loop()
    with Executor() as executor:
        calls = [loop.run_in_executor(executor, program, torch.randn(4)) for _ in range(5)]
        results = await asyncio.gather(*calls)
    print("sums:", [round(result["output"].sum().item(), 3) for result in results])


if __name__ == "__main__":
    asyncio.run(main())
