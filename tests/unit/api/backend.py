"""A daemon's back end that is small and real: it keeps what it was told and answers from it."""

from __future__ import annotations

import msgspec

from nextgpu_node.api_types import (
    DeviceView,
    InviteReply,
    InviteRequest,
    InvitesReply,
    InviteView,
    PeerNeed,
    PeersReply,
    PeerView,
    RevokeReply,
    SharingView,
    StatusReply,
    UnitsReply,
    UnitView,
)
from nextgpu_node.errors import NextGPUError, NoPeerFound

GIB = 1024**3
UNIT_ID = "0123456789abcdef0123456789abcdef"


class MemoryBackend:
    """`failure`, where set, is raised by the next question."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.needs: list[PeerNeed] = []
        self.sharing = False
        self.invites: list[InviteView] = []
        self.unit_ids = {UNIT_ID}
        self.device = DeviceView(
            kind="cpu", name="Test CPU", memory_total_bytes=8 * GIB, memory_free_bytes=4 * GIB
        )

    def status(self) -> StatusReply:
        self._maybe_fail()
        return StatusReply(
            version="0.1.0",
            peer_id="12D3KooWTest",
            addresses=["/ip4/127.0.0.1/tcp/1"],
            uptime_s=61.0,
            connected_peers=2,
            sharing=self._sharing(),
            devices=[self.device],
            runtime="torch 2.13.0+cpu",
            isolation=["namespaces", "seccomp"],
            isolation_tier="A",
            rss_bytes=90_000_000,
        )

    async def peers(self, need: PeerNeed) -> PeersReply:
        self._maybe_fail()
        self.needs.append(need)
        if need.memory_bytes > self.device.memory_total_bytes:
            return PeersReply(peers=[], candidates=1)
        return PeersReply(peers=[self._peer()], candidates=1)

    def units(self) -> UnitsReply:
        self._maybe_fail()
        views = [
            UnitView(
                unit_id=unit_id,
                role="lending",
                state="running",
                age_s=5.0,
                input_bytes=1000,
                output_bytes=0,
            )
            for unit_id in self.unit_ids
        ]
        return UnitsReply(units=views)

    async def cancel_unit(self, unit_id: str) -> bool:
        self._maybe_fail()
        known = unit_id in self.unit_ids
        self.unit_ids.discard(unit_id)
        return known

    def set_sharing(self, enabled: bool) -> SharingView:
        self._maybe_fail()
        self.sharing = enabled
        return self._sharing()

    async def issue_token(self, wanted: InviteRequest) -> InviteReply:
        self._maybe_fail()
        invite = InviteView(
            id="ab" * 32,
            gpu_seconds=wanted.gpu_seconds,
            spent_s=0,
            reserved_s=0,
            memory_bytes=wanted.memory_bytes,
            kinds=wanted.kinds,
            audience=wanted.audience,
            issued_at_ms=0,
            expires_at_ms=wanted.expires_s * 1000,
            revoked=False,
        )
        self.invites.append(invite)
        return InviteReply(invite=invite, token="ngt1_example")

    def issued_tokens(self) -> InvitesReply:
        self._maybe_fail()
        return InvitesReply(invites=self.invites)

    async def revoke_token(self, id_text: str) -> RevokeReply:
        self._maybe_fail()
        (found,) = [invite for invite in self.invites if invite.id.startswith(id_text)]
        return RevokeReply(invite=msgspec.structs.replace(found, revoked=True))

    def _sharing(self) -> SharingView:
        reason = "" if self.sharing else "the owner has not switched it on"
        return SharingView(
            enabled=self.sharing, active=self.sharing, reason=reason, slots=1, free_slots=1
        )

    def _peer(self) -> PeerView:
        return PeerView(
            peer_id="12D3KooWPeer",
            latency_ms=12.5,
            sharing=True,
            reason="",
            # What a hostile peer would put into a name: it must never reach a terminal.
            devices=[
                DeviceView(
                    kind="cuda",
                    name="Evil\x1b[31mGPU\r\n",
                    memory_total_bytes=8 * GIB,
                    memory_free_bytes=4 * GIB,
                    compute_capability="8.9",
                )
            ],
            free_slots=1,
            memory_bytes=4 * GIB,
            max_seconds=600,
            input_bytes=GIB,
            output_bytes=GIB,
            runtime="torch 2.13.0+cpu",
            table_version=1,
            isolation=["namespaces"],
        )

    def _maybe_fail(self) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


NOBODY = NoPeerFound("Nobody has such a device.")
OURS = NextGPUError("The disk is full.")
