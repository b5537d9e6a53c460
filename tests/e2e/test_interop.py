"""The second implementation and real daemons: over libp2p, through the relay and the sandbox."""

from __future__ import annotations

from typing import Any

import torch
import trio
from nacl.signing import SigningKey

from nextgpu_node.api_types import PeerView
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_node.sdk.events import ReceiptVerified, StepResult
from nextgpu_node.sdk.unit import Needs, open_unit
from nextgpu_protocol.limits import MIB
from tests.support.interop import bridge, node_command, node_peer
from tests.support.nodes import Trio
from tests.support.raw_peer import UNIT_PROTOCOL, RawPeer

SEED = b"interop provider".ljust(32, b".")


async def test_node_js_borrows_from_a_real_provider(peer: RawPeer) -> None:
    node_command()
    arguments = (peer.provider_id, bytes(peer.key).hex(), "4", "3")
    stream = await peer.network.open_stream(peer.provider_id, UNIT_PROTOCOL)
    with trio.fail_after(40):
        async with node_peer("submit", *arguments) as submitter, trio.open_nursery() as nursery:
            nursery.start_soon(bridge, submitter.stream, stream)
            outcome = await submitter.outcome()
    assert outcome["results"] == [[3], [6], [9]]
    assert outcome["checkpoint"] == [6]
    assert (outcome["status"], outcome["state"]) == ("done", "closed")


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


async def test_a_real_submitter_borrows_from_node_js(nodes: Trio) -> None:
    node_command()
    program = export(Double(), (torch.ones(4),))
    with trio.fail_after(40):
        async with node_peer("provide", SEED.hex()) as provider, trio.open_nursery() as nursery:

            async def serve(stream: PeerStream) -> None:
                await bridge(stream, provider.stream)

            network = _network({UNIT_PROTOCOL: serve})
            await nursery.start(network.run)
            await network.connect(nodes.submitter.ready.address)
            events = await _one_unit(nodes, network.peer_id, program)
            outcome = await provider.outcome()
            nursery.cancel_scope.cancel()
    (result,) = (event for event in events if isinstance(event, StepResult))
    (y,) = result.tensors.values()
    assert torch.equal(y, torch.full((4,), 6.0))
    assert isinstance(events[-1], ReceiptVerified)
    assert outcome == {"state": "closed", "status": "done", "acknowledged": True}


def _network(handlers: dict[str, Any]) -> Network:
    listen = ("/ip4/127.0.0.1/tcp/0",)
    seed = bytes(SigningKey(SEED))
    return Network(P2PSettings(key_seed=seed, listen_addrs=listen, dht_mode="client"), handlers)


async def _one_unit(nodes: Trio, peer_id: str, program: Program) -> list[Any]:
    (name,) = (spec.name for spec in program.spec.xs)
    peer = PeerView(
        peer_id=peer_id,
        latency_ms=1.0,
        sharing=True,
        reason="",
        devices=[],
        free_slots=1,
        memory_bytes=64 * MIB,
        max_seconds=30,
        input_bytes=MIB,
        output_bytes=MIB,
        runtime="",
        table_version=1,
        isolation=[],
    )
    socket = nodes.submitter.paths.units_socket
    async with open_unit(socket, peer, Needs(), table_version=1) as unit:
        await unit.start(program)
        await unit.send_step({name: torch.full((4,), 3.0)})
        await unit.close_input()
        return [event async for event in unit.events()]
