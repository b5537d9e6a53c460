"""The DHT of our own: signed announcements on our own streams.  Spec: 72-discovery.md

    Dht.serve       answers others' questions, in server mode
    Dht.announce    stores our announcements where they belong
    Dht.find        reads everybody's announcements of one key, each verified
    Dht.run         keeps the routing table alive

py-libp2p's KadDHT is not used: see docs/decisions/2026-11-25-own-dht.md.
"""

from __future__ import annotations

import itertools
import random
import secrets
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog
import trio
from nacl.signing import SigningKey

from nextgpu_node.clock import now_ms
from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p.lookup import CONFIRMED, PARALLEL, Lookup
from nextgpu_node.p2p.record_store import HELD, RecordStore
from nextgpu_node.p2p.routing_table import Node, RoutingTable, network_of
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_protocol.dht import (
    HEAD_BYTES,
    MAX_CONTACTS,
    MAX_LEVEL,
    MAX_PAGES,
    MAX_STORED_AT_ONCE,
    Contact,
    DhtMessage,
    Find,
    FindNode,
    Found,
    Nodes,
    Store,
    Stored,
    StoreItem,
    StoreResult,
    address_key,
    body_size_untrusted,
    branch_of,
    check_found_untrusted,
    decode_dht_untrusted,
    encode_dht,
    is_sampled,
    node_place,
    open_announcement_untrusted,
    rank,
    shard_place,
)
from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import KEY_BYTES, PeerKey, public_key_from_peer_id
from nextgpu_protocol.limits import MAX_MESSAGE_BYTES
from nextgpu_protocol.messages import SUITE, Announcement

log = structlog.get_logger()

HOLDERS: Final = 8
HOLDERS_ASKED: Final = 4
LIFETIME_MS: Final = 30 * 60 * 1000
# A shard is read whole, and a reader draws shards of about this many.
SHARD_PROVIDERS: Final = 128
_SHARDS_READ: Final = 8
ESTIMATE_S: Final = 3600.0

_ANSWER_S: Final = 5.0
# Negotiating a stream costs more than a question: one is kept for the next, well below _SERVE_S.
_REUSE_S: Final = 5.0
_SERVE_S: Final = 10.0
_SERVE_MESSAGES: Final = 64
_STREAMS_PER_PEER: Final = 4
# One less than is served: the last one may not have ended on the other side yet.
_CALLS_PER_NODE: Final = 3
_STORES_AT_ONCE: Final = 8
_LOOKUPS_AT_ONCE: Final = 4
_PAGE_BYTES: Final = MAX_MESSAGE_BYTES - 256
_PAGE_RECORDS: Final = 32

_SWEEP_S: Final = 30.0
_REFRESH_S: Final = 600.0
# A network that starts with us is still meeting itself.
_FIRST_REFRESHES_S: Final = (10.0, 60.0)
_NEIGHBOURS: Final = 16
_QUIET_S: Final = 900.0
_FEW_NODES: Final = 8

# What a server takes from one peer.  An honest one needs 10 to 20 stores in ten minutes.
STORES_PER_WINDOW: Final = 128
QUESTIONS_PER_WINDOW: Final = 1000
WINDOW_S: Final = 10.0
_PACE_MARGIN_S: Final = 1.0  # for clocks and queues
_MAX_TRACKED: Final = 4096

T = TypeVar("T")
OpenStream = Callable[[bytes, tuple[str, ...]], Awaitable[PeerStream]]
_lots = random.SystemRandom()
_CALL_FAILURES = (
    PeerLost,
    NetworkError,
    RemoteProtocolError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


class Pacer:
    """At most `burst` permissions in any `window_s` seconds, in the order asked for."""

    def __init__(self, burst: int, window_s: float) -> None:
        self._window_s = window_s
        self._given: deque[float] = deque(maxlen=burst)
        self._turn = trio.Lock()

    async def wait_turn(self) -> None:
        async with self._turn:
            if len(self._given) == self._given.maxlen:
                await trio.sleep_until(self._given[0] + self._window_s)
            self._given.append(trio.current_time())


class Allowance:
    """`limit` things of each peer in one window of `window_s` seconds; the rest is refused."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._used: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def take(self, peer: str, count: int, now_s: float) -> bool:
        began_s, used = self._used.pop(peer, (now_s, 0))
        if now_s - began_s >= self._window_s:
            began_s, used = now_s, 0
        granted = used + count <= self._limit
        self._used[peer] = (began_s, used + count if granted else used)
        while len(self._used) > _MAX_TRACKED:
            self._used.popitem(last=False)
        return granted


@dataclass(frozen=True, slots=True)
class FoundProviders:
    """Verified announcements, one of each peer, and how many there are in the network, about.

    `is_sample` is True where only an even part of them was read.
    """

    records: tuple[Signed[Announcement], ...]
    estimate: int
    is_sample: bool


@dataclass(slots=True)
class _Shard:
    sampling: int
    records: dict[PeerKey, Signed[Announcement]] = field(default_factory=dict)


class Dht:
    """One node's part of the DHT.

    `open_stream` opens a stream of the DHT's protocol to a node; `own_addresses` are what we
    announce; `connected_at` is the connected peer of a place, if there is one;
    `connected_servers` are those that serve the DHT.
    """

    def __init__(
        self,
        key: SigningKey,
        *,
        is_server: bool,
        open_stream: OpenStream,
        own_addresses: Callable[[], Sequence[str]],
        connected_at: Callable[[bytes], Contact | None],
        connected_servers: Callable[[], Sequence[Contact]],
    ) -> None:
        self._signing_key = key
        self.public_key = bytes(key.verify_key)
        self._is_server = is_server
        self._open_stream = open_stream
        self._own_addresses = own_addresses
        self._connected_at = connected_at
        self._connected_servers = connected_servers
        own_place = node_place(self.public_key)
        self.table = RoutingTable(own_place)
        self.store = RecordStore(own_place)
        self._own_place = own_place
        self._streams_of: Counter[str] = Counter()
        self._stores = Allowance(STORES_PER_WINDOW, WINDOW_S)
        self._questions = Allowance(QUESTIONS_PER_WINDOW, WINDOW_S)
        self._pacers: OrderedDict[bytes, Pacer] = OrderedDict()
        self._samplings: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        self._announced: set[bytes] = set()
        self._estimates: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._last_issued_ms = 0
        self.is_announced = False
        self._met = trio.Event()
        self._slots: dict[bytes, trio.CapacityLimiter] = {}
        self._kept: dict[bytes, tuple[PeerStream, float]] = {}

    # Keeping the table.

    async def run(self) -> None:
        """Sweep, refresh and look after the quiet ones, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep_forever)
            nursery.start_soon(self._drop_kept_streams_forever)
            nursery.start_soon(self._refresh_forever)

    async def enter(self, contact: Contact, network: str) -> None:
        """A peer that serves the DHT has identified itself; the first few lead to others."""
        is_news = contact.key not in self.table
        node = Node(contact.key, contact.addresses, network, trio.current_time())
        is_entered = self.table.answered(node)
        self._met.set()
        if is_entered and is_news and len(self.table) <= _FEW_NODES:
            await self.join()

    async def join(self) -> None:
        """Meet all our neighbours: what belongs near us is looked for at us from then on."""
        await self.nearest(self._own_place, _NEIGHBOURS)

    async def wait_met(self) -> None:
        """Until a first server of the DHT has been met."""
        await self._met.wait()

    async def _sweep_forever(self) -> None:
        while True:
            await trio.sleep(_SWEEP_S)
            self.store.sweep(now_ms())
            quiet = self.table.quietest(trio.current_time() - _QUIET_S)
            if quiet is not None:
                await self._ask_nodes(quiet, self._own_place)

    async def _drop_kept_streams_forever(self) -> None:
        while True:
            await trio.sleep(_REUSE_S)
            await self._drop_kept_streams()

    async def _refresh_forever(self) -> None:
        """Now and then look around in every part of the ring that has somebody in it."""
        for pause_s in itertools.chain(_FIRST_REFRESHES_S, itertools.repeat(_REFRESH_S)):
            await trio.sleep(pause_s * _lots.uniform(0.75, 1.25))
            await self.join()
            for index in self.table.bucket_indices():
                await self.nearest(self.table.place_in_bucket(index, secrets.token_bytes(32)))

    # Asking.

    async def nearest(self, place: bytes, confirmed: int = CONFIRMED) -> list[Node]:
        """The nodes nearest to `place`, ourselves left out, nearest first; the first `confirmed`
        have answered just now."""
        seeds = self.table.nearest(place, MAX_CONTACTS)
        if len(seeds) < _FEW_NODES:
            # A table that an outage has emptied fills again from whoever is connected.
            known = (Node(c.key, c.addresses, "", 0.0) for c in self._connected_servers())
            seeds += [node for node in known if node.key not in self.table]
        lookup = Lookup(place, max(HOLDERS, confirmed), self.public_key, seeds, confirmed)
        changed = trio.Condition()

        async def ask_on() -> None:
            while True:
                node = lookup.next()
                if node is None:
                    if lookup.is_done:
                        return
                    async with changed:
                        await changed.wait()
                    continue
                contacts = await self._ask_nodes(node, place)
                if contacts is None:
                    lookup.failed(node.key)
                else:
                    lookup.answered(node.key, contacts)
                async with changed:
                    changed.notify_all()

        async with trio.open_nursery() as nursery:
            for _ in range(PARALLEL):
                nursery.start_soon(ask_on)
        return lookup.result()[:HOLDERS]

    async def find_addresses(self, public_key: bytes) -> tuple[str, ...]:
        """Where a peer can be reached, as it says itself or as a node it is connected to knows."""
        found = await self.find(address_key(public_key))
        for record in found.records:
            if record.signer == public_key:
                return record.message.addresses
        place = node_place(public_key)
        for node in await self.nearest(place):
            for contact in await self._ask_nodes(node, place) or ():
                if contact.key == public_key:
                    return contact.addresses
        return ()

    async def find(self, key: bytes, wanted: int = 200) -> FoundProviders:
        """Who announces `key`: everybody, or where there are many an even sample of `wanted`."""
        estimate = self._remembered_estimate(key)
        root = None
        if not estimate:
            root = await self._read_shard(Find(key, 0, 0))
            estimate = len(root.records) << root.sampling
            if not root.sampling:
                return FoundProviders(tuple(root.records.values()), estimate, is_sample=False)
            self._remember_estimate(key, estimate)
        level = level_for(estimate)
        in_shard = max(estimate / 16**level, 1.0)
        count = min(_SHARDS_READ, int(wanted / in_shard) + 1, 16**level)
        shards: list[_Shard] = []

        async def read(branch: int) -> None:
            shards.append(await self._read_deep(Find(key, level, branch)))

        async with trio.open_nursery() as nursery:
            for branch in _lots.sample(range(16**level), count):
                nursery.start_soon(read, branch)
        found = {signer: one for shard in shards for signer, one in shard.records.items()}
        if len(found) < min(wanted, SHARD_PROVIDERS) // 2:
            # Shards that hold less than was to be expected: the sample of level 0 counts, too.
            self._estimates.pop(key, None)
            root = root or await self._read_shard(Find(key, 0, 0))
            found |= root.records
        return FoundProviders(tuple(found.values()), estimate, is_sample=True)

    def _remembered_estimate(self, key: bytes) -> int:
        """How many announced a crowded key within the last hour; 0 where it must be asked.

        Level 0 of a key that everybody looks for would otherwise be asked by everybody each time.
        """
        estimate, at_s = self._estimates.get(key, (0, 0.0))
        return estimate if trio.current_time() - at_s < ESTIMATE_S else 0

    def _remember_estimate(self, key: bytes, estimate: int) -> None:
        self._estimates[key] = (estimate, trio.current_time())
        while len(self._estimates) > _MAX_TRACKED:
            self._estimates.popitem(last=False)

    async def _read_deep(self, wanted: Find) -> _Shard:
        """A shard, or where it is overfull one below it."""
        shard = await self._read_shard(wanted)
        while shard.sampling and wanted.level < MAX_LEVEL:
            branch = wanted.branch * 16 + _lots.randrange(16)
            wanted = Find(wanted.key, wanted.level + 1, branch)
            shard = await self._read_shard(wanted)
        return shard

    async def _read_shard(self, wanted: Find) -> _Shard:
        """What the nearest holders of a shard and this node hold, taken together."""
        place = shard_place(wanted.key, wanted.level, wanted.branch)
        answers: list[tuple[int, dict[PeerKey, Signed[Announcement]]]] = []

        async def ask(node: Node) -> None:
            answer = await self._ask_records(node, wanted)
            if answer is not None:
                answers.append(answer)

        holders = await self.nearest(place)
        for batch in (holders[:HOLDERS_ASKED], holders[HOLDERS_ASKED:]):
            async with trio.open_nursery() as nursery:
                for node in batch:
                    nursery.start_soon(ask, node)
            if len(answers) >= HOLDERS_ASKED // 2:
                break
        if self._is_server:
            sampling, records = self.store.get(place, now_ms())
            answers.append((sampling, self._verified_untrusted(records, wanted)))
        return _together(answers)

    async def _ask_nodes(self, node: Node, target: bytes) -> list[Node] | None:
        """The nodes that `node` knows near `target`, or None where it does not answer."""

        async def ask_untrusted(stream: PeerStream) -> list[Node]:
            reply = await _ask_untrusted(stream, FindNode(target))
            if not isinstance(reply, Nodes):
                raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "NODES is missing")
            told = (contact for contact in reply.contacts if contact.key != self.public_key)
            return [_as_node(contact, stream.remote_ip) for contact in told]

        return await self._call(node, ask_untrusted)

    async def _ask_records(
        self, node: Node, wanted: Find
    ) -> tuple[int, dict[PeerKey, Signed[Announcement]]] | None:
        async def ask_untrusted(
            stream: PeerStream,
        ) -> tuple[int, dict[PeerKey, Signed[Announcement]]]:
            sampling, records = await _read_pages_untrusted(stream, wanted)
            return sampling, self._verified_untrusted(records, wanted)

        return await self._call(node, ask_untrusted)

    async def _call(self, node: Node, ask: Callable[[PeerStream], Awaitable[T]]) -> T | None:
        """What `ask` gets on a new stream to `node`, or None where it gets nothing in time.

        No more streams at once than the other side serves; the table hears how it went.
        """
        slots = self._slots.setdefault(node.key, trio.CapacityLimiter(_CALLS_PER_NODE))
        try:
            async with slots:
                with trio.fail_after(_ANSWER_S):
                    stream, answer = await self._call_on_a_stream(node, ask)
        except _CALL_FAILURES as exc:
            self.table.failed(node.key)
            log.debug("dht.no_answer", cause=type(exc).__name__)
            return None
        finally:
            if not slots.borrowed_tokens and not slots.statistics().tasks_waiting:
                self._slots.pop(node.key, None)
        network = network_of(stream.remote_ip)
        self.table.answered(Node(node.key, node.addresses, network, trio.current_time()))
        return answer

    async def _call_on_a_stream(
        self, node: Node, ask: Callable[[PeerStream], Awaitable[T]]
    ) -> tuple[PeerStream, T]:
        """On the stream of an earlier call where there is one that still works."""
        kept = self._kept.pop(node.key, None)
        if kept is not None:
            stream, opened_s = kept
            if trio.current_time() - opened_s < _REUSE_S:
                with suppress(PeerLost):
                    return stream, await self._ask_and_keep(node, stream, opened_s, ask)
            else:
                await _finish(stream)
        stream = await self._open_stream(node.key, node.addresses)
        return stream, await self._ask_and_keep(node, stream, trio.current_time(), ask)

    async def _ask_and_keep(
        self,
        node: Node,
        stream: PeerStream,
        opened_s: float,
        ask: Callable[[PeerStream], Awaitable[T]],
    ) -> T:
        try:
            answer = await ask(stream)
        except BaseException:
            await stream.reset()
            raise
        if node.key in self._kept:
            await _finish(stream)
        else:
            self._kept[node.key] = (stream, opened_s)
        return answer

    async def _drop_kept_streams(self) -> None:
        now_s = trio.current_time()
        for key, (stream, opened_s) in list(self._kept.items()):
            if now_s - opened_s >= _REUSE_S and self._kept.get(key) == (stream, opened_s):
                del self._kept[key]
                await _finish(stream)

    def _verified_untrusted(
        self, records: Iterable[bytes], wanted: Find
    ) -> dict[PeerKey, Signed[Announcement]]:
        """The newest announcement of each peer.  Raises where a holder passes on what is forged
        or belongs elsewhere; what has expired on its way is left out."""
        found: dict[PeerKey, Signed[Announcement]] = {}
        for data in dict.fromkeys(records):
            try:
                signed = open_announcement_untrusted(data, now_ms=now_ms())
            except RemoteProtocolError as exc:
                if exc.code in (ErrorCode.EXPIRED, ErrorCode.NOT_YET_VALID):
                    continue
                raise
            check_found_untrusted(signed, wanted)
            if signed.message.addresses:
                _keep_newer(found, signed)
        return found

    # Announcing.

    async def announce(self, keys: Sequence[bytes]) -> int:
        """Tell the network that we are found under `keys`, and take back what is no longer so.

        Returns how many of the keys somebody holds now.  Records live for half an hour: repeat
        this every ten minutes.
        """
        for key in keys:
            if len(key) != KEY_BYTES:
                raise ValueError(f"a capability key has {KEY_BYTES} bytes, not {len(key)}")
        wanted = dict.fromkeys([*keys, address_key(self.public_key)] if keys else [])
        withdrawn = [key for key in self._announced if key not in wanted]
        self._announced = set(wanted)
        records = {key: self._record(key, self._own_addresses()) for key in wanted}
        records |= {key: self._record(key, ()) for key in withdrawn}
        held: set[bytes] = set()
        pending = list(records)
        for level in range(MAX_LEVEL + 1):
            due = [key for key in pending if self._is_due(key, level)]
            results = await self._store_level({key: records[key] for key in due}, level)
            held |= {key for key, found in results.items() if any(r.code == HELD for r in found)}
            for key, found in results.items():
                # The one in the middle: a few liars among the holders do not decide.
                self._samplings[key, level] = int(statistics.median_low(r.sampling for r in found))
            pending = [key for key in pending if self._samplings.get((key, level), 0)]
        while len(self._samplings) > _MAX_TRACKED:
            self._samplings.popitem(last=False)
        self.is_announced = held.issuperset(keys)
        log.debug("capabilities.announced", keys=len(keys))
        return len(held.intersection(keys))

    def _record(self, key: bytes, addresses: Sequence[str]) -> bytes:
        issued_at_ms = self._last_issued_ms = max(now_ms(), self._last_issued_ms + 1)
        message = Announcement(
            SUITE, key, tuple(addresses), issued_at_ms, issued_at_ms + LIFETIME_MS
        )
        return sign_message(message, self._signing_key).data

    def _is_due(self, key: bytes, level: int) -> bool:
        """Whether to offer our record to this level: a full place would mostly refuse it."""
        sampling = self._samplings.get((key, level), 0)
        lot = rank(shard_place(key, level, branch_of(self.public_key, level)), self.public_key)
        return is_sampled(lot, max(sampling - 1, 0)) or _lots.random() < 2.0**-sampling

    async def _store_level(
        self, records: Mapping[bytes, bytes], level: int
    ) -> dict[bytes, list[StoreResult]]:
        """Store each record at its shard's holders; their results by key."""
        results: dict[bytes, list[StoreResult]] = {}
        batches: dict[bytes, tuple[Node, list[bytes]]] = {}
        lookups = trio.CapacityLimiter(_LOOKUPS_AT_ONCE)
        branch = branch_of(self.public_key, level)

        async def locate(key: bytes) -> None:
            place = shard_place(key, level, branch)
            async with lookups:
                holders = await self.nearest(place)
            if self._is_server and self._is_among(place, holders):
                results.setdefault(key, []).append(self._hold_own(records[key], level))
            for node in holders:
                batches.setdefault(node.key, (node, []))[1].append(key)

        async with trio.open_nursery() as nursery:
            for key in records:
                nursery.start_soon(locate, key)
        stores = trio.CapacityLimiter(_STORES_AT_ONCE)

        async def send(node: Node, keys: list[bytes]) -> None:
            async with stores:
                for start in range(0, len(keys), MAX_STORED_AT_ONCE):
                    part = keys[start : start + MAX_STORED_AT_ONCE]
                    items = tuple(StoreItem(level, records[key]) for key in part)
                    for key, result in zip(part, await self._send_store(node, items), strict=False):
                        results.setdefault(key, []).append(result)

        async with trio.open_nursery() as nursery:
            for node, keys in batches.values():
                nursery.start_soon(send, node, keys)
        return results

    async def _send_store(
        self, node: Node, items: tuple[StoreItem, ...]
    ) -> tuple[StoreResult, ...]:
        pacer = self._pacers.setdefault(
            node.key, Pacer(STORES_PER_WINDOW // MAX_STORED_AT_ONCE, WINDOW_S + _PACE_MARGIN_S)
        )
        while len(self._pacers) > _MAX_TRACKED:
            self._pacers.popitem(last=False)
        await pacer.wait_turn()

        async def ask_untrusted(stream: PeerStream) -> tuple[StoreResult, ...]:
            reply = await _ask_untrusted(stream, Store(items))
            if not isinstance(reply, Stored) or len(reply.results) != len(items):
                raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "STORED is missing")
            return reply.results

        return await self._call(node, ask_untrusted) or ()

    def _is_among(self, place: bytes, holders: Sequence[Node]) -> bool:
        """Whether we are one of the nodes that should hold what belongs to `place`."""
        if len(holders) < HOLDERS:
            return True
        own, farthest = self._own_place, holders[-1].place
        return _xor(own, place) < _xor(farthest, place)

    def _hold_own(self, record: bytes, level: int) -> StoreResult:
        signed = open_announcement_untrusted(record, now_ms=now_ms())
        return StoreResult(*self.store.put(signed, level, ""))

    # Serving.

    async def serve(self, stream: PeerStream) -> None:
        """Answer one peer's questions: four streams of a peer at once, ten seconds each."""
        peer = stream.peer_id
        if self._streams_of[peer] >= _STREAMS_PER_PEER:
            await stream.reset()
            return
        self._streams_of[peer] += 1
        try:
            # No limit on all streams together: peers keep theirs open between two questions, and
            # whoever is silent would shut the others out.  A stream that waits costs a task.
            with trio.move_on_after(_SERVE_S) as scope:
                await self._serve_untrusted(stream)
            if scope.cancelled_caught:
                await stream.reset()
        finally:
            self._streams_of[peer] -= 1
            if not self._streams_of[peer]:
                del self._streams_of[peer]

    async def _serve_untrusted(self, stream: PeerStream) -> None:
        for _ in range(_SERVE_MESSAGES):
            question = await receive_untrusted(stream)
            if question is None:
                return
            if not self._questions.take(stream.peer_id, 1, trio.current_time()):
                raise RemoteProtocolError(ErrorCode.RATE_LIMITED, "DHT questions")
            for answer in self._answers(question, stream):
                await stream.send_all(encode_dht(answer))

    def _answers(self, question: DhtMessage, stream: PeerStream) -> list[DhtMessage]:
        match question:
            case FindNode(target):
                return [Nodes(tuple(self._known_near(target, stream)))]
            case Store(items):
                return [Stored(tuple(self._take(item, stream) for item in items))]
            case Find(key, level, branch):
                return list(self._pages(shard_place(key, level, branch)))
            case _:
                raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "an answer, unasked")

    def _known_near(self, target: bytes, stream: PeerStream) -> list[Contact]:
        asker = public_key_from_peer_id(stream.peer_id)
        nodes = self.table.nearest(target, MAX_CONTACTS)
        near = [Contact(n.key, n.addresses) for n in nodes if n.key != asker]
        # Whoever asks for exactly one peer may be told where it is, though it is no server.
        exact = self._connected_at(target)
        if exact is not None:
            near = [exact, *(contact for contact in near if contact.key != exact.key)]
        return near[:MAX_CONTACTS]

    def _take(self, item: StoreItem, stream: PeerStream) -> StoreResult:
        if not self._stores.take(stream.peer_id, 1, trio.current_time()):
            return StoreResult(ErrorCode.RATE_LIMITED, 0)
        try:
            signed = open_announcement_untrusted(item.record, now_ms=now_ms())
            if signed.signer_id != stream.peer_id:
                raise RemoteProtocolError(ErrorCode.WRONG_PEER, "another peer's announcement")
        except RemoteProtocolError as exc:
            return StoreResult(exc.code, 0)
        network = network_of(stream.remote_ip)
        return StoreResult(*self.store.put(signed, item.level, network))

    def _pages(self, place: bytes) -> Iterable[Found]:
        sampling, records = self.store.get(place, now_ms())
        pages: list[list[bytes]] = [[]]
        size = 0
        for record in records:
            if size + len(record) > _PAGE_BYTES or len(pages[-1]) >= _PAGE_RECORDS:
                pages.append([])
                size = 0
            pages[-1].append(record)
            size += len(record) + 3
        pages = pages[:MAX_PAGES]
        for number, page in enumerate(pages, 1):
            yield Found(sampling, tuple(page), more=number < len(pages))


def level_for(estimate: int) -> int:
    """The lowest level whose shards hold about SHARD_PROVIDERS of `estimate` ones, or fewer."""
    level = 0
    while estimate / 16**level > SHARD_PROVIDERS and level < MAX_LEVEL:
        level += 1
    return level


def _together(answers: Sequence[tuple[int, dict[PeerKey, Signed[Announcement]]]]) -> _Shard:
    """Several holders' answers as one: all records, and the rate in the middle.

    A holder that has just joined or left its neighbours holds less; none of them is believed alone.
    """
    if not answers:
        return _Shard(0)
    shard = _Shard(int(statistics.median_low(sampling for sampling, _ in answers)))
    for _, records in answers:
        for signed in records.values():
            _keep_newer(shard.records, signed)
    return shard


def _keep_newer(found: dict[PeerKey, Signed[Announcement]], signed: Signed[Announcement]) -> None:
    known = found.get(signed.signer)
    if known is None or known.message.issued_at_ms < signed.message.issued_at_ms:
        found[signed.signer] = signed


def _as_node(contact: Contact, teller_ip: str) -> Node:
    return Node(contact.key, addresses_to_try(contact.addresses, teller_ip), "", 0.0)


def addresses_to_try(addresses: Sequence[str], teller_ip: str) -> tuple[str, ...]:
    """Of what another node says of a third one, what is worth dialling.

    A node on the public internet can send nobody into his own local network: what it says of
    private addresses is left out.
    """
    if not network_of(teller_ip):
        return tuple(addresses)
    return tuple(a for a in addresses if a.startswith("/dns") or network_of(_ip_in(a)))


def _ip_in(address: str) -> str:
    parts = address.split("/")
    return parts[2] if len(parts) > 2 else ""


def _xor(one: bytes, other: bytes) -> int:
    return int.from_bytes(one) ^ int.from_bytes(other)


# Messages on a stream.


async def receive_untrusted(stream: PeerStream) -> DhtMessage | None:
    """The next message, or None at the end between two.  Raises RemoteProtocolError."""
    head = await _exactly_untrusted(stream, HEAD_BYTES, may_end=True)
    if head is None:
        return None
    kind, size = body_size_untrusted(head)
    body = await _exactly_untrusted(stream, size)
    assert body is not None
    return decode_dht_untrusted(kind, body)


async def _exactly_untrusted(
    stream: PeerStream, size: int, *, may_end: bool = False
) -> bytes | None:
    got = b""
    while len(got) < size:
        data = await stream.receive_some(size - len(got))
        if not data:
            if may_end and not got:
                return None
            raise RemoteProtocolError(ErrorCode.TRUNCATED, "inside a DHT message")
        got += data
    return got


async def _ask_untrusted(stream: PeerStream, question: DhtMessage) -> DhtMessage:
    await stream.send_all(encode_dht(question))
    reply = await receive_untrusted(stream)
    if reply is None:
        raise RemoteProtocolError(ErrorCode.TRUNCATED, "no answer")
    return reply


async def _read_pages_untrusted(stream: PeerStream, wanted: Find) -> tuple[int, list[bytes]]:
    reply = await _ask_untrusted(stream, wanted)
    records: list[bytes] = []
    for _ in range(MAX_PAGES):
        if not isinstance(reply, Found):
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "FOUND is missing")
        records += reply.records
        if not reply.more:
            return reply.sampling, records
        following = await receive_untrusted(stream)
        if following is None:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, "a page is missing")
        reply = following
    raise RemoteProtocolError(ErrorCode.OVER_LIMIT, "pages")


async def _finish(stream: PeerStream) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        await stream.aclose()
