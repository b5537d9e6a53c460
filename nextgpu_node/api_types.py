"""Requests and replies of the local API, shared by `api` and `sdk`.

JSON on the unix socket.  Sizes in bytes, times in seconds unless the name says otherwise.  Every
reply carries `schema`; a field may be added under the same number, never changed or removed.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

SCHEMA = 1


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device as seen by its owner, or as a peer advertises it."""

    kind: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: str = ""


class SharingView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this node lends, and the one-line reason where it does not.

    `state` is "off", "paused", "draining", "starting" or "lending"; `cause` names the rule behind
    a pause ("owner", "hours", "battery", "activity", "application", "memory", "disk",
    "processor", "temperature", "power", "gpu_memory", "gpu_use", "sandbox").  `until_ms` is when
    it ends by itself, 0 where nobody knows.
    """

    enabled: bool
    active: bool
    reason: str
    slots: int
    free_slots: int
    state: str = "off"
    cause: str = ""
    until_ms: int = 0
    note: str = ""  # why what was said holds for this run only, where it does


class StatusReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/status"""

    schema: int = SCHEMA
    version: str
    peer_id: str
    addresses: list[str]
    uptime_s: float
    connected_peers: int
    sharing: SharingView
    devices: list[DeviceView]
    runtime: str
    isolation: list[str]
    isolation_tier: str
    rss_bytes: int


class PeerNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a submitter needs of a peer; the query of GET /v1/peers."""

    kind: str = "any"
    memory_bytes: int = 0
    limit: int = 20


class PeerView(msgspec.Struct, frozen=True, kw_only=True):
    """A peer whose signed capacity was fetched and verified just now, best first."""

    peer_id: str
    latency_ms: float
    sharing: bool
    reason: str
    devices: list[DeviceView]
    free_slots: int
    memory_bytes: int
    max_seconds: int
    input_bytes: int
    output_bytes: int
    runtime: str
    table_version: int
    isolation: list[str]


class PeersReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/peers.  `candidates` were asked; `estimate` announce such a device in all, about.

    Where that is more than one answer takes, `sampled` says that an even part of them was asked.
    """

    schema: int = SCHEMA
    peers: list[PeerView]
    candidates: int
    estimate: int = 0
    sampled: bool = False


class UnitView(msgspec.Struct, frozen=True, kw_only=True):
    """A unit that is here now, in either role.  Never its content.

    `memory_bytes` is what its worker here holds in memory, shared pages of the launcher included;
    0 where there is none.
    """

    unit_id: str
    role: str  # "lending" or "borrowing"
    state: str
    age_s: float
    input_bytes: int
    output_bytes: int
    memory_bytes: int = 0


class UnitsReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/units"""

    schema: int = SCHEMA
    units: list[UnitView]


class ForeignUseView(msgspec.Struct, frozen=True, kw_only=True):
    """A program that is not ours on a device."""

    name: str
    memory_bytes: int


class GpuView(msgspec.Struct, frozen=True, kw_only=True):
    """A device with what it does now, for its owner.  None: it does not say."""

    label: str  # "cuda:0", "cpu"
    kind: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: str = ""
    utilisation: float | None = None  # 0.0 to 1.0
    temperature_c: float | None = None
    power_w: float | None = None
    foreign: list[ForeignUseView] | None = None
    lent: bool = False  # the owner's settings include it
    state: str = "off"  # as SharingView.state
    reason: str = ""


class GpusReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/gpus"""

    schema: int = SCHEMA
    gpus: list[GpuView]


class PauseRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/sharing/pause.  0 seconds: until `resume`."""

    seconds: int = 0


class LimitsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /v1/limits: keys of the settings' [sharing] section with their new values, as text."""

    changes: dict[str, str]


class LimitView(msgspec.Struct, frozen=True, kw_only=True):
    """One setting of [sharing]: its key, its value in short form, what it takes."""

    key: str
    value: str
    expected: str


class LimitsReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET and PUT /v1/limits.  `saved` is false where the settings file could not be written:
    the change then holds until the daemon ends.  `note` says why, or what else to know."""

    schema: int = SCHEMA
    limits: list[LimitView]
    saved: bool = True
    note: str = ""


class ServeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /v1/serving/{peer_id}.  `rule` is "allow", "deny" or "none".

    `terms` are this peer's own limits: "units", "seconds_per_day", "requests_per_minute" as whole
    numbers, "kinds" as "program,python"; what is not named is as for everyone.
    """

    rule: str
    terms: dict[str, str] = {}


class ServedPeerView(msgspec.Struct, frozen=True, kw_only=True):
    """A peer that the settings name, and what it has used of the last 24 hours."""

    peer_id: str
    rule: str
    terms: dict[str, str]
    used_s: float


class ServingReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET and PUT /v1/serving.  `serve` is the setting of that name."""

    schema: int = SCHEMA
    serve: str
    peers: list[ServedPeerView]
    saved: bool = True
    note: str = ""


class PastUnitView(msgspec.Struct, frozen=True, kw_only=True):
    """A unit that ran here.  Never its content.

    `peer` is the submitter's peer ID for a day, then a hash that only compares within this record.
    """

    unit_id: str
    peer: str
    peer_is_hash: bool
    kind: str
    device: str
    started_at_ms: int
    wall_ms: int
    cpu_ms: int
    input_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    status: str
    wiped: bool
    receipt_sha256: str


class HistoryReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/history?limit=, newest first; DELETE /v1/history gives the empty one."""

    schema: int = SCHEMA
    enabled: bool
    keep_days: int
    units: list[PastUnitView]


class HistoryRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /v1/history: record from now on, or do not."""

    enabled: bool


class ShareRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /v1/sharing"""

    enabled: bool


class SharingReply(SharingView, frozen=True, kw_only=True):
    """The reply to PUT /v1/sharing: what is lent from now on."""

    schema: int = SCHEMA


class CancelReply(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/units/{unit_id}/cancel"""

    schema: int = SCHEMA
    cancelled: bool


class InviteRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/invites: the token that is wanted.  `audience` is a peer ID, or empty."""

    gpu_seconds: int
    expires_s: int
    memory_bytes: int
    kinds: list[str] = []
    audience: str = ""


class InviteView(msgspec.Struct, frozen=True, kw_only=True):
    """A token that this node has issued: what it allows and what was spent, never its text."""

    id: str
    gpu_seconds: int
    spent_s: float
    reserved_s: float
    memory_bytes: int
    kinds: list[str]
    audience: str
    issued_at_ms: int
    expires_at_ms: int
    revoked: bool


class InviteReply(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to POST /v1/invites, the one place where the token itself appears."""

    schema: int = SCHEMA
    invite: InviteView
    token: str


class InvitesReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/invites"""

    schema: int = SCHEMA
    invites: list[InviteView]


class RevokeReply(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/invites/{id}/revoke"""

    schema: int = SCHEMA
    invite: InviteView


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """Any reply with status >= 400.  `exit_code` is what the command line should end with."""

    schema: int = SCHEMA
    error: str
    exit_code: int


class Backend(Protocol):
    """What the daemon gives to the local API."""

    def status(self) -> StatusReply: ...

    async def peers(self, need: PeerNeed) -> PeersReply: ...

    def units(self) -> UnitsReply: ...

    async def cancel_unit(self, unit_id: str) -> bool: ...

    def set_sharing(self, enabled: bool) -> SharingView: ...

    def pause(self, seconds: int) -> SharingView: ...

    def resume(self) -> SharingView: ...

    def drain(self) -> SharingView: ...

    async def gpus(self) -> GpusReply: ...

    def limits(self) -> LimitsReply: ...

    async def set_limits(self, changes: dict[str, str]) -> LimitsReply: ...

    def serving(self) -> ServingReply: ...

    async def set_serving(self, peer_id: str, rule: str, terms: dict[str, str]) -> ServingReply: ...

    async def history(self, limit: int) -> HistoryReply: ...

    async def clear_history(self) -> HistoryReply: ...

    async def set_history(self, enabled: bool) -> HistoryReply: ...

    async def issue_token(self, wanted: InviteRequest) -> InviteReply: ...

    def issued_tokens(self) -> InvitesReply: ...

    async def revoke_token(self, id_text: str) -> RevokeReply: ...
