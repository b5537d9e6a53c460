"""A model over many batches, on whatever peers lend now.

Needs `nextgpu up` here and peers that share.  The model runs there as data, sealed to one sandboxed
worker process on each peer; what comes back is what the model would give here.
"""

import torch

from nextgpu_node.sdk import Executor


def main() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    batches = [torch.randn(4, 8) for _ in range(20)]
    with Executor(gpu="any") as executor:  # "vram>=12GB" or "cuda, vram>=12GB" for a large card
        future = executor.submit(model, batches[0])
        print("one batch:", tuple(future.result(timeout=60).shape))
        results = list(executor.map(model, batches, timeout=120))
    with torch.no_grad():
        same = all(torch.allclose(r, model(b), atol=1e-5) for r, b in zip(results, batches))
    print("20 batches, as here:", same)


if __name__ == "__main__":
    main()
