"""Whole units between the two implementations: each end in turn is the other's."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
from nacl.signing import SigningKey

from nextgpu_node.api_types import PeerView
from nextgpu_node.daemon.borrowing import Borrowing
from nextgpu_node.errors import JobFailed, NextGPUError
from nextgpu_node.frames import FrameStream
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.identity import Identity
from nextgpu_node.sdk.events import Finished, ReceiptVerified, StepResult, UnitEvent
from nextgpu_node.sdk.unit import Needs, RemoteUnit
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.limits import CHUNK_PLAINTEXT_BYTES, MIB
from tests.support.interop import NodePeer, node_peer
from tests.support.messages import PROVIDER, STRANGER, SUBMITTER
from tests.support.plain_provider import lend

PROVIDER_ID = peer_id_from_public_key(bytes(PROVIDER.verify_key))
SMALL = 4
# One tensor of more than a chunk: records are cut and joined, the padding spans chunks.
LARGE = CHUNK_PLAINTEXT_BYTES // 4 + 1000


class _Provider:
    """What `Borrowing` needs of a network, with one peer in it."""

    def __init__(self, peer: NodePeer) -> None:
        self._peer = peer

    async def open_stream(self, peer_id: str, protocol: str) -> trio.abc.Stream:
        assert (peer_id, protocol) == (PROVIDER_ID, "/nextgpu/unit/1")
        return self._peer.stream


def seed(key: SigningKey) -> str:
    return bytes(key).hex()


def a_peer(size_bytes: int) -> PeerView:
    return PeerView(
        peer_id=PROVIDER_ID,
        latency_ms=1.0,
        sharing=True,
        reason="",
        devices=[],
        free_slots=1,
        memory_bytes=MIB,
        max_seconds=30,
        input_bytes=size_bytes,
        output_bytes=size_bytes,
        runtime="",
        table_version=1,
        isolation=[],
    )


# --- Node.js borrows -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_what_node_js_seals_the_worker_opens_and_back(node: list[str], size: int) -> None:
    arguments = (PROVIDER_ID, seed(SUBMITTER), str(size), "3")
    with trio.fail_after(60):
        async with node_peer("submit", *arguments) as submitter:
            ack = await lend(submitter.stream, PROVIDER)
            outcome = await submitter.outcome()
    assert ack.signer == bytes(SUBMITTER.verify_key)
    assert outcome["results"] == [[3], [6], [9]]
    assert outcome["checkpoint"] == [6]
    assert outcome["summary"]["steps"] == 3
    assert (outcome["status"], outcome["state"]) == ("done", "closed")


async def test_node_js_takes_no_offer_of_another_key(node: list[str]) -> None:
    arguments = (PROVIDER_ID, seed(SUBMITTER), str(SMALL), "1")
    with trio.fail_after(30):
        async with node_peer("submit", *arguments) as submitter:
            left = pytest.RaisesExc(RemoteProtocolError, match="HEADER is missing")
            with pytest.RaisesGroup(left, flatten_subgroups=True):
                await lend(submitter.stream, STRANGER)
            outcome = await submitter.outcome()
    assert outcome["error"] == "WRONG_PEER"


# --- Node.js lends ---------------------------------------------------------------------------


class ScaleAndSum(torch.nn.Module):
    """y = x * w and sum' = sum + x: two operators, so that a stranger's worker can be small."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((size,), 3.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w + x


@asynccontextmanager
async def unit_at(peer: NodePeer, size_bytes: int) -> AsyncIterator[RemoteUnit]:
    """A unit of the SDK through the relay of a real daemon, the peer being Node.js."""
    ours, theirs = (
        trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()
    )
    network: Any = _Provider(peer)
    async with trio.open_nursery() as nursery, ours:
        nursery.start_soon(Borrowing(network, Identity.ephemeral()).serve, theirs)
        unit = RemoteUnit(FrameStream(ours), a_peer(size_bytes))
        await unit.negotiate(Needs(), 1)
        yield unit
        await ours.aclose()


async def run(peer: NodePeer, program: Program, inputs: list[torch.Tensor]) -> list[UnitEvent]:
    (name,) = (spec.name for spec in program.spec.xs)
    failure: NextGPUError | None = None
    events: list[UnitEvent] = []
    async with unit_at(peer, 16 * MIB) as unit:
        await unit.start(program)
        for x in inputs:
            await unit.send_step({name: x})
        await unit.close_input()
        try:
            events = [event async for event in unit.events()]
        except NextGPUError as exc:
            failure = exc  # after the relay has passed the acknowledgement on
    if failure is not None:
        raise failure
    return events


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_what_the_sdk_seals_node_js_opens_and_back(node: list[str], size: int) -> None:
    program = export(ScaleAndSum(size), (torch.ones(size),))
    inputs = [torch.full((size,), float(k)) for k in (1, 2, 3)]
    with trio.fail_after(60):
        async with node_peer("provide", seed(PROVIDER)) as provider:
            events = await run(provider, program, inputs)
            outcome = await provider.outcome()
    results = [event for event in events if isinstance(event, StepResult)]
    for x, result in zip(inputs, results, strict=True):
        (y,) = result.tensors.values()
        assert torch.equal(y, 4 * x)
    (finished,) = (event for event in events if isinstance(event, Finished))
    assert finished.summary.steps == 3
    assert isinstance(events[-1], ReceiptVerified)
    assert outcome == {"state": "closed", "status": "done", "acknowledged": True}


async def test_an_operator_that_node_js_does_not_have_is_named(node: list[str]) -> None:
    program = export(torch.nn.Tanh(), (torch.ones(SMALL),))
    with trio.fail_after(30):
        async with node_peer("provide", seed(PROVIDER)) as provider:
            with pytest.raises(JobFailed, match="tanh"):
                await run(provider, program, [torch.ones(SMALL)])
            outcome = await provider.outcome()
    assert (outcome["status"], outcome["acknowledged"]) == ("failed", True)
