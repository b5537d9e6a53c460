"""The keys that a peer had before, as it shows them itself.  Spec: 15-succession.md"""

from __future__ import annotations

from collections import OrderedDict

import structlog
import trio

from nextgpu_node.core.admission import OwnerPolicy
from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.frames import ByteStream, FrameStream
from nextgpu_node.p2p.network import Network
from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import PeerKey
from nextgpu_protocol.messages import UnitRequest
from nextgpu_protocol.succession import predecessors_untrusted

log = structlog.get_logger()

SUCCESSIONS_PROTOCOL = "/nextgpu/successions/1"
_DEADLINE_S = 3
_MAX_REMEMBERED = 4096


async def serve_successions(stream: ByteStream, record: bytes) -> None:
    """Answer one stream with this node's own changes of key."""
    with trio.move_on_after(_DEADLINE_S):
        await FrameStream(stream).send(FrameKind.SUCCESSIONS, record)


class FormerKeys:
    """Asks peers for their successions.  A chain is as old as the key it leads to, so an answer
    holds for good; a peer that did not answer is asked again."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known: OrderedDict[str, frozenset[PeerKey]] = OrderedDict()

    async def of(
        self, request: Signed[UnitRequest], connected_peer: str, policy: OwnerPolicy
    ) -> frozenset[PeerKey]:
        """Of the signer of `request`, where they can matter; a bad chain counts as none."""
        # A request may come through another peer; only the signer can speak for its own past.
        if request.signer_id != connected_peer or not _can_matter(request, policy):
            return frozenset()
        if connected_peer in self._known:
            return self._known[connected_peer]
        try:
            with trio.fail_after(_DEADLINE_S):
                keys = await self._ask_untrusted(connected_peer, request.signer)
        except (RemoteProtocolError, NetworkError, PeerLost, trio.BrokenResourceError) as exc:
            log.debug("succession.not_shown", cause=type(exc).__name__)
            return frozenset()
        except trio.TooSlowError:
            return frozenset()
        self._known[connected_peer] = keys
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return keys

    async def _ask_untrusted(self, peer_id: str, peer_key: PeerKey) -> frozenset[PeerKey]:
        stream = await self._network.open_stream(peer_id, SUCCESSIONS_PROTOCOL)
        try:
            body = await FrameStream(stream).expect_untrusted(FrameKind.SUCCESSIONS)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await stream.aclose()
        return frozenset(predecessors_untrusted(body, peer_key))


def _can_matter(request: Signed[UnitRequest], policy: OwnerPolicy) -> bool:
    by_list = bool(policy.allow) and policy.serve != "everyone"
    return bool(policy.deny or request.message.token or by_list)
