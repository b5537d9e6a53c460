"""joblib and Dask with peers below them (pip install 'nextgpu-node[worker,adapters]')."""

import dask
import joblib
import torch

from nextgpu_node.sdk import Executor
from nextgpu_node.sdk.adapters.joblib import register


def main() -> None:
    model = torch.nn.Tanh()
    inputs = [torch.full((2,), float(i)) for i in range(8)]
    register()
    with Executor() as executor:
        with joblib.parallel_backend("nextgpu", executor=executor):
            by_joblib = joblib.Parallel()(joblib.delayed(model)(x) for x in inputs)
        lazy = [dask.delayed(model, traverse=False)(x) for x in inputs]
        by_dask = dask.compute(*lazy, scheduler=executor)
    print("equal:", all(map(torch.equal, by_joblib, by_dask)))


if __name__ == "__main__":
    main()
