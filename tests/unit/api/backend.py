"""A daemon's back end that is small and real: it keeps what it was told and answers from it."""

from __future__ import annotations

import msgspec

from nextgpu_node.api_types import (
    DeviceView,
    GpusReply,
    HistoryReply,
    InviteReply,
    InviteRequest,
    InvitesReply,
    InviteView,
    LimitsReply,
    PastUnitView,
    PeerNeed,
    PeersReply,
    PeerView,
    RevokeReply,
    ServedPeerView,
    ServingReply,
    SharingView,
    StatusReply,
    UnitsReply,
    UnitView,
)
from nextgpu_node.config import Config, SharingConfig, read_changes, with_changes
from nextgpu_node.errors import NextGPUError, NoPeerFound
from nextgpu_node.hostinfo.devices import Usage, list_devices
from nextgpu_node.hostinfo.views import as_gpu
from nextgpu_node.sharing_settings import limit_views, serving_changes

GIB = 1024**3
UNIT_ID = "0123456789abcdef0123456789abcdef"


PAST = PastUnitView(
    unit_id=UNIT_ID,
    peer="12D3KooWSubmitter",
    peer_is_hash=False,
    kind="program",
    device="Test CPU",
    started_at_ms=1_700_000_000_000,
    wall_ms=1500,
    cpu_ms=900,
    input_bytes=2048,
    output_bytes=1024,
    peak_memory_bytes=GIB,
    status="done",
    wiped=True,
    receipt_sha256="ab" * 32,
)


class MemoryBackend:
    """`failure`, where set, is raised by the next question."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.needs: list[PeerNeed] = []
        self.sharing = False
        self.pauses: list[int] = []
        self.config = SharingConfig()
        self.saves, self.note = True, ""
        self.records = True
        self.past = [PAST]
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

    def pause(self, seconds: int) -> SharingView:
        self._maybe_fail()
        self.pauses.append(seconds)
        return self._sharing()

    def resume(self) -> SharingView:
        self._maybe_fail()
        self.pauses.append(-1)
        return self._sharing()

    def drain(self) -> SharingView:
        self._maybe_fail()
        return msgspec.structs.replace(self._sharing(), active=False, state="draining")

    async def gpus(self) -> GpusReply:
        self._maybe_fail()
        return GpusReply(gpus=[as_gpu(list_devices()[-1], Usage(0.5, 61.0, None), ())])

    def limits(self) -> LimitsReply:
        self._maybe_fail()
        return LimitsReply(limits=limit_views(self.config))

    async def set_limits(self, changes: dict[str, str]) -> LimitsReply:
        self._maybe_fail()
        checked = read_changes({f"sharing.{key}": text for key, text in changes.items()})
        self.config = with_changes(Config(sharing=self.config), checked).sharing
        return LimitsReply(limits=limit_views(self.config), saved=self.saves, note=self.note)

    def serving(self) -> ServingReply:
        self._maybe_fail()
        rules = dict.fromkeys(self.config.allow, "allow") | dict.fromkeys(self.config.deny, "deny")
        peers = [
            ServedPeerView(peer_id=peer, rule=rule, terms={}, used_s=61)
            for peer, rule in rules.items()
        ]
        return ServingReply(serve=self.config.serve, peers=peers)

    async def set_serving(self, peer_id: str, rule: str, terms: dict[str, str]) -> ServingReply:
        self._maybe_fail()
        changes = serving_changes(self.config, peer_id, rule, terms)
        self.config = with_changes(Config(sharing=self.config), read_changes(changes)).sharing
        return msgspec.structs.replace(self.serving(), saved=self.saves, note=self.note)

    async def history(self, limit: int) -> HistoryReply:
        self._maybe_fail()
        units = self.past[:limit] if self.records else []
        return HistoryReply(enabled=self.records, keep_days=7, units=units)

    async def clear_history(self) -> HistoryReply:
        self.past.clear()
        return await self.history(1)

    async def set_history(self, enabled: bool) -> HistoryReply:
        self.records = enabled
        return await self.history(1)

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
            enabled=self.sharing,
            active=self.sharing,
            reason=reason,
            slots=1,
            free_slots=1,
            state="lending" if self.sharing else "off",
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
