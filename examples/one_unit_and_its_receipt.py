"""One program on one peer, without trio: its results, then everything that happens to a unit."""

import torch

from nextgpu_node import sdk
from nextgpu_node.sdk.events import PeerChosen, ReceiptVerified, StepResult


def main() -> None:
    program = sdk.export(torch.nn.Linear(4, 1), (torch.ones(2, 4),))
    print("shape:", tuple(sdk.run(program, torch.ones(2, 4))["output"].shape))
    (name,) = (spec.name for spec in program.spec.xs)
    steps = [{name: torch.full((2, 4), float(i))} for i in range(3)]
    with sdk.run_events(program, steps) as events:
        for event in events:
            match event:
                case PeerChosen(peer=peer):
                    print("peer:", peer.devices[0].kind)
                case StepResult(index=index):
                    print("step", index)
                case ReceiptVerified(receipt=receipt):
                    print("receipt:", receipt.status)


if __name__ == "__main__":
    main()
