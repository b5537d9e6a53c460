"""The provider's decisions, pure: events in, effects out.

    UnitRequested ─► [SpawnWorker]            WorkerReady ─► [SendOffer]
    HeaderReceived ─► [StartUnit]             OutputEnded ─► [AwaitExit]
      under a token ─► [SaveReservation], then ReservationSaved ─► [StartUnit]
    WorkerEnded ─► [WipeWorker]               Wiped ─► [SendReceipt], under a token [Settle] first
    anything that goes wrong ─► [KillWorker(status)] or [Refuse(code)]

The driver in `daemon/lending.py` performs the effects; each ends as one event back to `handle`.
No clock, no random, no I/O here: `now_ms` comes in, ids come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from nextgpu_node.core.admission import (
    Grant,
    OwnerPolicy,
    PeerLoad,
    RateLimiter,
    ReplayCache,
    Submitter,
    check_freshness,
    check_not_denied,
    check_policy,
    check_quota,
)
from nextgpu_node.core.quotas import UsageBook
from nextgpu_node.core.tokens import Reservation, TokenBook
from nextgpu_protocol.checks import check_header_untrusted
from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerId, PeerKey, peer_id_from_public_key
from nextgpu_protocol.messages import (
    Offer,
    UnitHeader,
    UnitRequest,
)
from nextgpu_protocol.tokens import (
    TokenChain,
    check_audience_untrusted,
    check_token_untrusted,
    open_token_untrusted,
)

SessionId = int  # names one peer stream inside this daemon


class UnitState(Enum):
    """Where a lent unit stands."""

    STARTING = "starting"
    OFFERED = "offered"
    RUNNING = "running"
    ENDING = "ending"
    WIPING = "wiping"
    OVER = "over"


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnitRequested:
    session: SessionId
    request: Signed[UnitRequest]
    sender: PeerId  # at the other end of the connection, whoever signed
    former_keys: frozenset[PeerKey] = frozenset()  # that the signer verifiably had before


@dataclass(frozen=True, slots=True)
class WorkerReady:
    session: SessionId


@dataclass(frozen=True, slots=True)
class WorkerFailedToStart:
    session: SessionId


@dataclass(frozen=True, slots=True)
class OfferSent:
    session: SessionId
    offer: Signed[Offer]


@dataclass(frozen=True, slots=True)
class HeaderReceived:
    session: SessionId
    header: Signed[UnitHeader]


@dataclass(frozen=True, slots=True)
class ReservationSaved:
    """The token's account is on disk: the unit may start."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class OutputEnded:
    """The worker said END: nothing more will come from it."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class UnitStopped:
    """Something outside the worker ends the unit: `status` is what the receipt will say."""

    session: SessionId
    status: str
    code: ErrorCode


@dataclass(frozen=True, slots=True)
class OwnerReturned:
    """The owner wants the device back."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """The worker process is gone; `status` is what its end means."""

    session: SessionId
    status: str


@dataclass(frozen=True, slots=True)
class Wiped:
    session: SessionId
    wall_ms: int = 0  # what the receipt will say


@dataclass(frozen=True, slots=True)
class SessionOver:
    """The stream is closed, in whatever state."""

    session: SessionId


Event = (
    UnitRequested
    | WorkerReady
    | WorkerFailedToStart
    | OfferSent
    | HeaderReceived
    | ReservationSaved
    | OutputEnded
    | UnitStopped
    | OwnerReturned
    | WorkerEnded
    | Wiped
    | SessionOver
)


# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refuse:
    """Say no and close the stream."""

    code: ErrorCode
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SpawnWorker:
    """Take a fresh worker under these limits -> WorkerReady or WorkerFailedToStart."""

    grant: Grant
    kind: str = "program"  # UnitRequest.kind


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Sign and send an offer with the worker's one-time key -> OfferSent."""

    request: Signed[UnitRequest]
    grant: Grant


@dataclass(frozen=True, slots=True)
class SaveReservation:
    """Put what is set aside on disk -> ReservationSaved, or UnitStopped."""

    reservation: Reservation


@dataclass(frozen=True, slots=True)
class Settle:
    """Put what was spent on disk in place of the reservation."""

    reservation: Reservation
    charged_ms: int


@dataclass(frozen=True, slots=True)
class StartUnit:
    """Hand the worker its assignment and let ciphertext flow -> OutputEnded, WorkerEnded, …"""

    offer: Signed[Offer]
    header: Signed[UnitHeader]


@dataclass(frozen=True, slots=True)
class AskToGiveBack:
    """Have the worker save its state and end -> WorkerEnded, or UnitStopped when its time is up."""


@dataclass(frozen=True, slots=True)
class AwaitExit:
    """The worker has said all: give it a moment to exit by itself -> WorkerEnded."""


@dataclass(frozen=True, slots=True)
class WipeWorker:
    """Kill what is left, wipe, verify -> Wiped."""


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """Sign and send the receipt, wait for its acknowledgement, close the stream."""

    status: str


@dataclass(frozen=True, slots=True)
class Discard:
    """No unit came of it: get rid of the worker and close the stream."""

    code: ErrorCode
    detail: str = ""


Effect = (
    Refuse
    | SpawnWorker
    | SendOffer
    | SaveReservation
    | StartUnit
    | AskToGiveBack
    | AwaitExit
    | WipeWorker
    | Settle
    | SendReceipt
    | Discard
)


@dataclass(slots=True)
class _Unit:
    request: Signed[UnitRequest]
    names: Submitter
    grant: Grant
    reservation: Reservation | None = None
    state: UnitState = UnitState.STARTING
    offer: Signed[Offer] | None = None
    header: Signed[UnitHeader] | None = None
    saved: bool = False  # the reservation is on disk
    status: str = ""


class Lending:
    """Every unit that is lent now, and the admission state around them."""

    def __init__(
        self,
        own_key: PeerKey,
        policy: OwnerPolicy,
        *,
        table_version: int,
        tokens: TokenBook | None = None,
        own_former_keys: frozenset[PeerKey] = frozenset(),
    ) -> None:
        self._own_key = own_key
        self._issuers = own_former_keys | {own_key}
        self.tokens = tokens or TokenBook()
        self.usage = UsageBook()
        self.table_version = table_version
        self._units: dict[SessionId, _Unit] = {}
        self._seen = ReplayCache()
        self._rate = RateLimiter(policy.requests_per_minute)
        self.policy = policy

    @property
    def used_slots(self) -> int:
        """Units that hold, or are about to hold, a worker."""
        return len(self._units)

    def state_of(self, session: SessionId) -> UnitState:
        unit = self._units.get(session)
        return unit.state if unit else UnitState.OVER

    def handle(self, event: Event, *, now_ms: int) -> list[Effect]:  # noqa: C901  one row each
        """What to do about `event`."""
        match event:
            case UnitRequested():
                return self._requested(event, now_ms)
            case WorkerReady():
                return self._worker_ready(event.session)
            case WorkerFailedToStart():
                return self._drop(event.session, ErrorCode.INTERNAL, "no worker could be started")
            case OfferSent():
                return self._offer_sent(event)
            case HeaderReceived():
                return self._header_received(event, now_ms)
            case ReservationSaved():
                return self._reservation_saved(event.session)
            case OutputEnded():
                return self._move(event.session, UnitState.RUNNING, UnitState.ENDING, AwaitExit())
            case UnitStopped():
                return self._stopped(event)
            case OwnerReturned():
                return self._owner_returned(event.session)
            case WorkerEnded():
                return self._worker_ended(event)
            case Wiped():
                return self._wiped(event, now_ms)
            case SessionOver():
                return self._over(event.session)
            case _:
                assert_never(event)

    def _requested(self, event: UnitRequested, now_ms: int) -> list[Effect]:
        try:
            # First, since a request costs its sender a key of any kind, and us a remembered hash.
            self._check_rate(event.sender, event.sender, now_ms)
            check_freshness(event.request, self._own_key, self._seen, now_ms=now_ms)
            signer = event.request.signer
            self._check_rate(signer, peer_id_from_public_key(signer), now_ms)
            unit = self._admit(event.request, event.former_keys, now_ms)
        except RemoteProtocolError as exc:
            return [Refuse(exc.code, exc.detail)]
        self._units[event.session] = unit
        return [SpawnWorker(unit.grant, unit.request.message.kind)]

    def _check_rate(self, name: PeerKey | PeerId, peer: PeerId, now_ms: int) -> None:
        per_minute = self.policy.limit_for((peer,), "requests_per_minute")
        self._rate.check(name, now_ms=now_ms, per_minute=per_minute)

    def load_of(self, names: Submitter, *, now_ms: int) -> PeerLoad:
        """What a submitter has here; running units count with all that they may use."""
        alive = [unit for unit in self._units.values() if unit.state is not UnitState.OVER]
        running = [unit for unit in alive if unit.names.ids & names.ids]
        held_ms = sum(unit.request.message.max_seconds * 1000 for unit in running)
        used_ms = self.usage.used_ms(names.ids, now_ms=now_ms)
        return PeerLoad(len(running), used_ms + held_ms)

    def _admit(
        self, request: Signed[UnitRequest], former_keys: frozenset[PeerKey], now_ms: int
    ) -> _Unit:
        names = Submitter(request.signer, former_keys)
        check_not_denied(names, self.policy)
        token = self._open_token_untrusted(request, names, now_ms)
        grant = check_policy(
            request,
            self.policy,
            table_version=self.table_version,
            used_slots=self.used_slots,
            names=names,
            token=token,
        )
        check_quota(request.message, names, self.policy, self.load_of(names, now_ms=now_ms))
        if token is None:
            return _Unit(request, names, grant)
        # Last of all: nothing is set aside for a request that is refused for another reason.
        reservation = self.tokens.reserve(token, request.hash, request.message.max_seconds)
        return _Unit(request, names, grant, reservation)

    def _open_token_untrusted(
        self, request: Signed[UnitRequest], names: Submitter, now_ms: int
    ) -> TokenChain | None:
        message = request.message
        if not message.token:
            return None
        chain = open_token_untrusted(
            message.token, submitter_key=request.signer, request_nonce=message.nonce
        )
        check_token_untrusted(chain, issuers=self._issuers, now_ms=now_ms)
        self.tokens.check_known(chain)
        check_audience_untrusted(chain, names.keys)
        return chain

    def sessions_under(self, token_id: bytes) -> list[SessionId]:
        """Units that run under this token, or are about to."""
        return [
            session
            for session, unit in self._units.items()
            if unit.reservation is not None and unit.reservation.token_id == token_id
        ]

    def sessions_of_denied(self) -> list[SessionId]:
        """Units of submitters that the owner has denied since they came."""
        denied = self.policy.deny
        return [session for session, unit in self._units.items() if unit.names.ids & denied]

    def _worker_ready(self, session: SessionId) -> list[Effect]:
        unit = self._units.get(session)
        if unit is None or unit.state is not UnitState.STARTING:
            return []
        if not self.policy.sharing:
            return self._drop(session, ErrorCode.NOT_SHARING, self.policy.reason)
        return [SendOffer(unit.request, unit.grant)]

    def _offer_sent(self, event: OfferSent) -> list[Effect]:
        unit = self._units[event.session]
        unit.offer, unit.state = event.offer, UnitState.OFFERED
        return []

    def _header_received(self, event: HeaderReceived, now_ms: int) -> list[Effect]:
        unit = self._units[event.session]
        try:
            assert unit.offer is not None
            check_header_untrusted(event.header, unit.request, unit.offer, now_ms=now_ms)
        except RemoteProtocolError as exc:
            return self._drop(event.session, exc.code, exc.detail)
        unit.header = event.header
        if unit.reservation is not None:
            return [SaveReservation(unit.reservation)]
        return self._start(unit)

    def _reservation_saved(self, session: SessionId) -> list[Effect]:
        unit = self._units.get(session)
        if unit is None or unit.state is not UnitState.OFFERED:
            return []
        unit.saved = True
        return self._start(unit)

    def _start(self, unit: _Unit) -> list[Effect]:
        assert unit.offer is not None
        assert unit.header is not None
        unit.state = UnitState.RUNNING
        return [StartUnit(unit.offer, unit.header)]

    def _stopped(self, event: UnitStopped) -> list[Effect]:
        unit = self._units.get(event.session)
        if unit is None or unit.state in (UnitState.WIPING, UnitState.OVER):
            return []
        if unit.state in (UnitState.STARTING, UnitState.OFFERED):
            return self._drop(event.session, event.code, "")
        unit.status, unit.state = event.status, UnitState.WIPING
        return [WipeWorker()]

    def _owner_returned(self, session: SessionId) -> list[Effect]:
        """A unit that runs may save its state; one that is ending has its results on their way."""
        unit = self._units.get(session)
        if unit is None:
            return []
        if unit.state in (UnitState.STARTING, UnitState.OFFERED):
            return self._drop(session, ErrorCode.NOT_SHARING, self.policy.reason)
        return [AskToGiveBack()] if unit.state is UnitState.RUNNING else []

    def _worker_ended(self, event: WorkerEnded) -> list[Effect]:
        unit = self._units.get(event.session)
        if unit is None or unit.state not in (UnitState.RUNNING, UnitState.ENDING):
            return []
        # A worker that exits "done" without its END frame has not delivered everything.
        cut_short = unit.state is UnitState.RUNNING and event.status == "done"
        unit.status = "worker_crashed" if cut_short else event.status
        unit.state = UnitState.WIPING
        return [WipeWorker()]

    def _wiped(self, event: Wiped, now_ms: int) -> list[Effect]:
        unit = self._units[event.session]
        unit.state = UnitState.OVER
        peer = peer_id_from_public_key(unit.request.signer)
        self.usage.add(peer, event.wall_ms, at_ms=now_ms)
        receipt = SendReceipt(unit.status)
        if unit.reservation is None:
            return [receipt]
        charged_ms = self.tokens.settle(unit.reservation, event.wall_ms)
        return [Settle(unit.reservation, charged_ms), receipt]

    def _over(self, session: SessionId) -> list[Effect]:
        unit = self._units.pop(session, None)
        if unit is not None and unit.reservation is not None:
            if not unit.saved:
                self.tokens.release(unit.reservation)
            else:
                # It ran and was never settled: as after a crash, all of it counts.  On disk the
                # reservation stands, and the next start comes to the same.
                self.tokens.settle(unit.reservation, unit.reservation.reserved_ms)
        return []

    def _move(
        self, session: SessionId, before: UnitState, after: UnitState, effect: Effect
    ) -> list[Effect]:
        unit = self._units.get(session)
        if unit is None or unit.state is not before:
            return []
        unit.state = after
        return [effect]

    def _drop(self, session: SessionId, code: ErrorCode, detail: str) -> list[Effect]:
        self._units[session].state = UnitState.OVER
        return [Discard(code, detail)]
