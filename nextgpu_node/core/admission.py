"""Admission: may this request have a worker?  Pure; reads only the envelope.

The checks run from cheap to dear and from safety to capacity, so that a refusal never tells a
stranger more than needed: a submitter that is not served does not learn the load.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nextgpu_node.peer_terms import PeerTerms
from nextgpu_protocol.checks import check_request_untrusted
from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerId, PeerKey, peer_id_from_public_key
from nextgpu_protocol.limits import MAX_CLOCK_SKEW_MS
from nextgpu_protocol.messages import (
    DeviceInfo,
    UnitRequest,
)
from nextgpu_protocol.tokens import TokenChain, check_within_token_untrusted

_MINUTE_MS = 60_000
_MAX_TRACKED_PEERS = 4096
_MAX_REMEMBERED_REQUESTS = 16_384


@dataclass(frozen=True, slots=True)
class OwnerPolicy:
    """What the owner allows.

    `serve`: "allow" is the peers in `allow`, or everyone where it is empty; "tokens" is those in
    `allow` and whoever brings a token of this node; "everyone" is what it says.  `deny` wins.
    """

    sharing: bool
    reason: str  # why not, in one line
    device: DeviceInfo | None
    max_concurrent_units: int
    memory_bytes: int
    max_seconds: int
    input_bytes: int
    output_bytes: int
    requests_per_minute: int
    allow: frozenset[PeerId] = frozenset()
    deny: frozenset[PeerId] = frozenset()
    serve: str = "allow"
    # Whose Python may run here.  There is no "everyone", on purpose.
    python_allow: frozenset[PeerId] = frozenset()
    # Of one submitter: units at once, and device seconds in 24 hours; 0: no limit of its own.
    peer_units: int = 0
    peer_seconds_per_day: int = 0
    terms: Mapping[PeerId, PeerTerms] = field(default_factory=dict)

    def terms_of(self, ids: Iterable[PeerId]) -> PeerTerms | None:
        """Terms of its own, under any name that the submitter has or had."""
        return next((self.terms[peer] for peer in ids if peer in self.terms), None)

    def limit_for(self, ids: Iterable[PeerId], name: str) -> int:
        """`name` is a number of PeerTerms; what its own terms leave open is as for everyone."""
        own = getattr(self.terms_of(ids), name, None)
        everyone: int = getattr(self, "requests_per_minute" if name == "requests_per_minute"
                                else f"peer_{name}")  # fmt: skip
        return everyone if own is None else own


@dataclass(frozen=True, slots=True)
class Grant:
    """The limits a unit runs under: the request's, within the owner's.

    Memory is the owner's limit even where less was asked for: workers are confined before they
    know their unit, which is what makes them quick.  A token that allows less holds: its unit gets
    a worker of its own size.
    """

    memory_bytes: int
    max_seconds: int
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Submitter:
    """Who asks: the key that signed, and those that it verifiably had before."""

    key: PeerKey
    former_keys: frozenset[PeerKey] = frozenset()

    @property
    def keys(self) -> frozenset[PeerKey]:
        return self.former_keys | {self.key}

    @property
    def ids(self) -> frozenset[PeerId]:
        return frozenset(map(peer_id_from_public_key, self.keys))


class ReplayCache:
    """Hashes of requests already seen, until they have expired anyway.  Bounded: when it is full
    of unexpired ones, new requests are refused rather than old ones forgotten."""

    def __init__(self, capacity: int = _MAX_REMEMBERED_REQUESTS) -> None:
        self._capacity = capacity
        self._expiry_ms: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._expiry_ms)

    def check_and_add(self, digest: bytes, *, forget_at_ms: int, now_ms: int) -> None:
        """Remember `digest`; RemoteProtocolError(REPLAYED) where it is known already."""
        if digest in self._expiry_ms:
            raise RemoteProtocolError(ErrorCode.REPLAYED)
        if len(self._expiry_ms) >= self._capacity:
            self._forget_expired(now_ms)
        if len(self._expiry_ms) >= self._capacity:
            raise RemoteProtocolError(ErrorCode.RATE_LIMITED)
        self._expiry_ms[digest] = forget_at_ms

    def _forget_expired(self, now_ms: int) -> None:
        for digest in [d for d, at_ms in self._expiry_ms.items() if at_ms < now_ms]:
            del self._expiry_ms[digest]


@dataclass(slots=True)
class RateLimiter:
    """At most `per_minute` requests in any minute from one submitter, by key, and over one peer's
    connections, by peer ID."""

    per_minute: int
    _seen_ms: OrderedDict[PeerKey | PeerId, deque[int]] = field(default_factory=OrderedDict)

    def check(self, name: PeerKey | PeerId, *, now_ms: int, per_minute: int | None = None) -> None:
        """`per_minute` is this submitter's own limit, where it has one."""
        times = self._seen_ms.setdefault(name, deque())
        self._seen_ms.move_to_end(name)
        while times and times[0] <= now_ms - _MINUTE_MS:
            times.popleft()
        if len(times) >= (per_minute or self.per_minute):
            raise RemoteProtocolError(ErrorCode.RATE_LIMITED)
        times.append(now_ms)
        if len(self._seen_ms) > _MAX_TRACKED_PEERS:
            self._seen_ms.popitem(last=False)


def check_not_denied(names: Submitter, policy: OwnerPolicy) -> None:
    """Before anything else of a submitter is looked at, its token too."""
    if names.ids & policy.deny:
        raise RemoteProtocolError(ErrorCode.NOT_ALLOWED)


def check_policy(
    request: Signed[UnitRequest],
    policy: OwnerPolicy,
    *,
    table_version: int,
    used_slots: int,
    names: Submitter | None = None,
    token: TokenChain | None = None,
) -> Grant:
    """The grant, or RemoteProtocolError with the code that the submitter is told.

    `token` is the request's own, verified, or None.
    """
    names = names or Submitter(request.signer)
    check_not_denied(names, policy)
    if not _is_served(names, policy, has_token=token is not None):
        raise RemoteProtocolError(ErrorCode.NOT_ALLOWED)
    _check_kind(request.message.kind, names, policy)
    if not policy.sharing:
        raise RemoteProtocolError(ErrorCode.NOT_SHARING, policy.reason)
    _check_device(request.message, policy)
    if request.message.table_version > table_version:
        raise RemoteProtocolError(ErrorCode.OLD_TABLE, f"this node has version {table_version}")
    grant = _grant(request.message, policy)
    if token is not None:
        check_within_token_untrusted(token, request.message)
        memory_bytes = min(grant.memory_bytes, token.allows.memory_bytes)
        grant = replace(grant, memory_bytes=memory_bytes)
    if used_slots >= policy.max_concurrent_units:
        raise RemoteProtocolError(ErrorCode.BUSY)
    return grant


def check_freshness(
    request: Signed[UnitRequest], own_key: PeerKey, seen: ReplayCache, *, now_ms: int
) -> None:
    """Is it for us, of this suite, in its time, and the first of its kind?"""
    check_request_untrusted(request, own_key, now_ms=now_ms)
    # Kept for the clock skew too: until then the window check would let a replay through.
    forget_at_ms = request.message.expires_at_ms + 2 * MAX_CLOCK_SKEW_MS
    seen.check_and_add(request.hash, forget_at_ms=forget_at_ms, now_ms=now_ms)


def _is_served(names: Submitter, policy: OwnerPolicy, *, has_token: bool) -> bool:
    listed = bool(names.ids & policy.allow)
    match policy.serve:
        case "everyone":
            return True
        case "tokens":
            return listed or has_token
        case _:
            return listed or not policy.allow


def _check_kind(kind: str, names: Submitter, policy: OwnerPolicy) -> None:
    """A token opens the door for programs, never for code: that takes the submitter's name."""
    terms = policy.terms_of(names.ids)
    own = terms.kinds if terms is not None else None
    if own is not None and kind in own:
        return
    if kind == "python" and (own is not None or not names.ids & policy.python_allow):
        raise RemoteProtocolError(ErrorCode.PYTHON_NOT_ALLOWED)
    if own is not None:
        raise RemoteProtocolError(ErrorCode.NOT_ALLOWED, f"units of the kind {kind}")


@dataclass(frozen=True, slots=True)
class PeerLoad:
    """What one submitter has here: units now, and device time in 24 hours, theirs included."""

    units: int = 0
    used_ms: int = 0


def check_quota(
    request: UnitRequest, names: Submitter, policy: OwnerPolicy, load: PeerLoad
) -> None:
    """One submitter's share of the device.  A unit counts with all that it may use."""
    units = policy.limit_for(names.ids, "units")
    if units and load.units >= units:
        raise RemoteProtocolError(ErrorCode.BUSY, f"{units} units of yours at a time")
    seconds = policy.limit_for(names.ids, "seconds_per_day")
    left_ms = seconds * 1000 - load.used_ms
    if seconds and request.max_seconds * 1000 > left_ms:
        detail = f"max_seconds: {request.max_seconds} of {max(0, left_ms) // 1000} left today"
        raise RemoteProtocolError(ErrorCode.OVER_LIMIT, detail)


def _check_device(request: UnitRequest, policy: OwnerPolicy) -> None:
    device = policy.device
    if device is None or request.device_kind not in ("any", device.kind):
        raise RemoteProtocolError(ErrorCode.NO_SUCH_DEVICE, f"kind {request.device_kind}")
    if request.device_memory_bytes > device.memory_total_bytes:
        raise RemoteProtocolError(ErrorCode.NO_SUCH_DEVICE, "not enough device memory")


def _grant(request: UnitRequest, policy: OwnerPolicy) -> Grant:
    for name in Grant.__dataclass_fields__:
        asked, allowed = getattr(request, name), getattr(policy, name)
        if asked > allowed:
            raise RemoteProtocolError(ErrorCode.OVER_LIMIT, f"{name}: {asked} of {allowed}")
    return Grant(
        policy.memory_bytes, request.max_seconds, request.input_bytes, request.output_bytes
    )
