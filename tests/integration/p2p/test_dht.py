"""The DHT over real connections, and what attackers of it achieve."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from nacl.signing import SigningKey

from nextgpu_node.clock import now_ms
from nextgpu_node.errors import PeerLost
from nextgpu_node.p2p import dht as dhts
from nextgpu_node.p2p.dht import STORES_PER_WINDOW, addresses_to_try
from nextgpu_node.p2p.hardening import DHT_PROTOCOL
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_protocol.dht import (
    Contact,
    DhtMessage,
    Find,
    FindNode,
    Found,
    Nodes,
    Store,
    Stored,
    StoreItem,
    encode_dht,
    open_announcement_untrusted,
)
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.messages import SUITE, Announcement
from tests.integration.p2p.nodes import find, read_all, start, table_size, until

KEY = hashlib.sha256(b"capability").digest()
ADDRESS = ("/ip4/127.0.0.1/tcp/9",)
HOUR_MS = 3_600_000


def announcement(seed: bytes, **changes: Any) -> bytes:
    issued_at_ms = changes.pop("at_ms", now_ms())
    fields = {
        "key": KEY,
        "addresses": ADDRESS,
        "issued_at_ms": issued_at_ms,
        "expires_at_ms": issued_at_ms + 60_000,
    } | changes
    return sign_message(Announcement(suite=SUITE, **fields), SigningKey(seed)).data


async def store(node: Network, holder: str, *records: bytes, level: int = 0) -> list[int]:
    """What a holder says to records that come straight from `node`."""
    stream = await node.open_stream(holder, DHT_PROTOCOL)
    items = tuple(StoreItem(level, record) for record in records)
    await stream.send_all(encode_dht(Store(items)))
    reply = await dhts.receive_untrusted(stream)
    await stream.aclose()
    assert isinstance(reply, Stored)
    return [result.code for result in reply.results]


async def test_a_holder_takes_only_what_its_signer_brings_and_only_while_it_holds() -> None:
    own, other = os.urandom(32), os.urandom(32)
    good = announcement(own)
    forged = good[:-1] + bytes([good[-1] ^ 1])
    now = now_ms()
    records = {
        good: 0,
        forged: ErrorCode.BAD_SIGNATURE,
        announcement(other): ErrorCode.WRONG_PEER,
        announcement(own, at_ms=now - HOUR_MS): ErrorCode.EXPIRED,
        announcement(own, at_ms=now + HOUR_MS): ErrorCode.NOT_YET_VALID,
        announcement(own, at_ms=now - 5000): ErrorCode.REPLAYED,
        os.urandom(300): ErrorCode.MALFORMED,
        bytes(2000): ErrorCode.TOO_LARGE,
        b"": ErrorCode.MALFORMED,
    }
    async with trio.open_nursery() as nursery:
        holder, address = await start(nursery)
        attacker, _ = await start(nursery, key_seed=own, dht_mode="client")
        await attacker.connect(address)
        codes = await store(attacker, holder.peer_id, *records)
        assert codes == [int(code) for code in records.values()]
        assert await holder.find_providers(KEY) == [attacker.peer_id]
        assert holder._dht is not None
        assert len(holder._dht.store) == 1
        nursery.cancel_scope.cancel()


async def test_a_flood_of_announcements_is_cut_and_the_rest_goes_on() -> None:
    seed = os.urandom(32)
    async with trio.open_nursery() as nursery:
        holder, address = await start(nursery)
        attacker, _ = await start(nursery, key_seed=seed, dht_mode="client")
        await attacker.connect(address)
        codes: list[int] = []
        for number in range(0, 256, 16):
            keys = [hashlib.sha256(b"%d" % n).digest() for n in range(number, number + 16)]
            codes += await store(
                attacker, holder.peer_id, *(announcement(seed, key=k) for k in keys)
            )
        assert set(codes[STORES_PER_WINDOW:]) == {int(ErrorCode.RATE_LIMITED)}
        assert holder._dht is not None
        assert len(holder._dht.store) == 64  # what one peer may have in all
        honest, _ = await start(nursery, bootstrap=(address,))
        await until(lambda: table_size(honest))
        assert await honest.announce([KEY]) == 1
        nursery.cancel_scope.cancel()


async def test_more_keys_than_a_holder_takes_at_once_are_paced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dhts, "STORES_PER_WINDOW", 16)
    monkeypatch.setattr(dhts, "WINDOW_S", 0.5)
    keys = [hashlib.sha256(b"%d" % n).digest() for n in range(40)]
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        provider, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(provider))
        began_s = trio.current_time()
        assert await provider.announce(keys) == 40
        assert trio.current_time() - began_s > 1.5
        nursery.cancel_scope.cancel()


async def test_announcements_expire_unless_they_are_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dhts, "LIFETIME_MS", 1500)
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        provider, _ = await start(nursery, bootstrap=(address,))
        seeker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(provider) and table_size(seeker))
        for _ in range(4):
            # Each time anew, over more than two lifetimes.
            assert await provider.announce([KEY]) == 1
            assert await seeker.find_providers(KEY) == [provider.peer_id]
            await trio.sleep(0.8)
        await trio.sleep(0.8)
        assert await seeker.find_providers(KEY) == []
        nursery.cancel_scope.cancel()


async def test_what_is_no_longer_announced_is_taken_back_at_once() -> None:
    other = hashlib.sha256(b"other").digest()
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        provider, _ = await start(nursery, bootstrap=(address,))
        seeker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(provider) and table_size(seeker))
        await provider.announce([KEY, other])
        await find(seeker, KEY, {provider.peer_id})
        await provider.announce([other])
        await find(seeker, KEY, set())
        assert await seeker.find_providers(other) == [provider.peer_id]
        await provider.announce([])
        await find(seeker, other, set())
        nursery.cancel_scope.cancel()


async def test_the_newest_addresses_count_and_a_new_provider_is_seen_at_once() -> None:
    """Nothing is answered from a cache."""
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        seeker, _ = await start(nursery, bootstrap=(address,))
        await until(lambda: table_size(seeker))
        providers: set[str] = set()
        for _ in range(3):
            provider, _ = await start(nursery, bootstrap=(address,))
            await until(lambda p=provider: table_size(p))  # type: ignore[misc]
            await provider.announce([KEY])
            providers.add(provider.peer_id)
            assert set(await seeker.find_providers(KEY)) == providers
        nursery.cancel_scope.cancel()


# Holders that lie.  Each serves the DHT's protocol, so everybody enters it.

Answer = Callable[[PeerStream, DhtMessage], Awaitable[None]]


def lying(answer: Answer) -> dict[str, Any]:
    async def serve(stream: PeerStream) -> None:
        with suppress(PeerLost):
            while (question := await dhts.receive_untrusted(stream)) is not None:
                await answer(stream, question)

    return {DHT_PROTOCOL: serve}


async def poisoned(stream: PeerStream, question: DhtMessage) -> None:
    """Records that are forged, of another key, expired, and a mighty sampling rate."""
    if not isinstance(question, Find):
        await stream.send_all(encode_dht(Nodes(())))
        return
    seed = os.urandom(32)
    good = announcement(seed, key=question.key)
    records = (
        good[:-1] + bytes([good[-1] ^ 1]),
        announcement(seed, key=hashlib.sha256(b"elsewhere").digest()),
        announcement(seed, key=question.key, at_ms=now_ms() - HOUR_MS),
        os.urandom(100),
    )
    await stream.send_all(encode_dht(Found(48, records, more=False)))


async def misplaced(stream: PeerStream, question: DhtMessage) -> None:
    """A good announcement of somebody else, of another key."""
    if not isinstance(question, Find):
        await stream.send_all(encode_dht(Nodes(())))
        return
    other = announcement(os.urandom(32), key=hashlib.sha256(b"elsewhere").digest())
    await stream.send_all(encode_dht(Found(0, (other,), more=False)))


async def replaying(stream: PeerStream, question: DhtMessage) -> None:
    """A record that was true once."""
    if not isinstance(question, Find):
        await stream.send_all(encode_dht(Nodes(())))
        return
    old = announcement(bytes(32), key=question.key, at_ms=now_ms() - HOUR_MS)
    await stream.send_all(encode_dht(Found(0, (old,), more=False)))


async def endless(stream: PeerStream, question: DhtMessage) -> None:
    while True:
        await stream.send_all(encode_dht(Found(0, (os.urandom(1000),) * 7, more=True)))


async def garbage(stream: PeerStream, question: DhtMessage) -> None:
    await stream.send_all(os.urandom(5000))


async def huge(stream: PeerStream, question: DhtMessage) -> None:
    await stream.send_all(b"\xff\xff\xff\xff\x06")


async def silent(stream: PeerStream, question: DhtMessage) -> None:
    await trio.sleep_forever()


async def strangers(stream: PeerStream, question: DhtMessage) -> None:
    """Nodes that do not exist, or that are somebody else's machines."""
    contacts = tuple(
        Contact(os.urandom(32), ("/ip4/127.0.0.1/tcp/1", "no address", "/unix/x"))
        for _ in range(20)
    )
    await stream.send_all(encode_dht(Nodes(contacts)))


@pytest.mark.parametrize(
    "answer", [poisoned, misplaced, replaying, endless, garbage, huge, silent, strangers]
)
async def test_liars_among_the_holders_hide_nobody_and_add_nobody(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dhts, "_ANSWER_S", 0.5)
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        # As clients they do not serve an honest DHT beside their own.
        for _ in range(3):
            await start(nursery, lying(answer), bootstrap=(address,), dht_mode="client")
        provider, _ = await start(nursery, bootstrap=(address,))
        await until(lambda: table_size(provider) >= 1)
        assert await provider.announce([KEY]) == 1
        seeker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(seeker) >= 1)
        with trio.fail_after(15):
            assert await seeker.find_providers(KEY) == [provider.peer_id]
        assert seeker._dht is not None
        for contact in seeker._dht.table:
            assert "no address" not in contact.addresses
        nursery.cancel_scope.cancel()


async def test_a_fast_lie_of_full_places_does_not_send_a_provider_away() -> None:
    """Two of five holders say that they sample: the one in the middle decides."""

    async def answer(stream: PeerStream, question: DhtMessage) -> None:
        match question:
            case Store(items):
                results = tuple(dhts.StoreResult(ErrorCode.OVER_LIMIT, 48) for _ in items)
                await stream.send_all(encode_dht(Stored(results)))
            case _:
                await stream.send_all(encode_dht(Nodes(())))

    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        addresses = [address]
        for _ in range(2):
            addresses.append((await start(nursery, bootstrap=(address,)))[1])
        for _ in range(2):
            _, liar = await start(nursery, lying(answer), bootstrap=(address,), dht_mode="client")
            addresses.append(liar)
        provider, _ = await start(nursery, dht_mode="client")
        for one in addresses:
            await provider.connect(one)
        await until(lambda: table_size(provider) == 5, 15)
        assert await provider.announce([KEY]) == 1
        assert provider._dht is not None
        assert provider._dht._samplings[KEY, 0] == 0
        nursery.cancel_scope.cancel()


def test_a_node_on_the_internet_sends_nobody_into_his_own_network() -> None:
    told = ("/ip4/192.168.1.1/tcp/80", "/ip4/127.0.0.1/tcp/22", "/ip4/9.9.9.9/tcp/4650", "/x")
    assert addresses_to_try(told, teller_ip="8.8.8.8") == ("/ip4/9.9.9.9/tcp/4650",)
    assert addresses_to_try(told, teller_ip="192.168.1.7") == told


async def test_a_restarted_node_finds_the_network_without_its_bootstrap() -> None:
    seed = os.urandom(32)
    async with trio.open_nursery() as nursery:
        _, first = await start(nursery)
        provider, _ = await start(nursery, bootstrap=(first,))
        await until(lambda: table_size(provider))
        async with trio.open_nursery() as earlier:
            node, _ = await start(earlier, bootstrap=(first,), key_seed=seed)
            with trio.fail_after(10):
                while len(known := node.known_peers()) < 2:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            earlier.cancel_scope.cancel()
        known = [address for address in known if not first.endswith(address.split("/p2p/")[1])]
        await provider.announce([KEY])
        again, _ = await start(nursery, key_seed=seed, known_peers=("nonsense", *known))
        await until(lambda: table_size(again))
        assert await again.find_providers(KEY) == [provider.peer_id]
        nursery.cancel_scope.cancel()


async def test_questions_that_are_none_end_their_stream_only() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        node, _ = await start(nursery, dht_mode="client")
        peer_id = await node.connect(address)
        for bad in (b"\xff" * 5, encode_dht(Nodes(())), encode_dht(FindNode(KEY))[:-1] + b"\0\0"):
            stream = await node.open_stream(peer_id, DHT_PROTOCOL)
            await stream.send_all(bad)
            await stream.send_eof()
            with pytest.raises(PeerLost), trio.fail_after(3):
                await read_all(stream)
        stream = await node.open_stream(peer_id, DHT_PROTOCOL)
        for _ in range(3):  # several questions on one stream
            await stream.send_all(encode_dht(FindNode(KEY)))
            assert isinstance(await dhts.receive_untrusted(stream), Nodes)
        nursery.cancel_scope.cancel()


async def test_of_a_crowded_key_each_search_finds_another_even_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """600 announce it, 256 fit at one place: shards hold everybody, and level 0 tells how many."""
    asked: list[int] = []
    read_shard = dhts.Dht._read_shard

    async def spy(dht: dhts.Dht, wanted: Find) -> Any:
        asked.append(wanted.level)
        return await read_shard(dht, wanted)

    monkeypatch.setattr(dhts.Dht, "_read_shard", spy)
    async with trio.open_nursery() as nursery:
        holder, address = await start(nursery)
        seeker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(seeker))
        assert holder._dht is not None
        assert seeker._dht is not None
        for number in range(600):
            data = announcement(hashlib.sha256(b"%d" % number).digest())
            signed = open_announcement_untrusted(data, now_ms=now_ms())
            for level in (0, 1):
                holder._dht.store.put(signed, level, "")
        seen: Counter[str] = Counter()
        for _ in range(8):
            found = await seeker._dht.find(KEY)
            assert found.is_sample
            assert 400 < found.estimate < 800
            assert len(found.records) > 100
            seen.update(one.signer_id for one in found.records)
        assert len(seen) > 500
        assert asked.count(0) == 1
        nursery.cancel_scope.cancel()


async def test_idle_streams_of_many_peers_shut_nobody_out() -> None:
    """Peers keep a stream for their next question: a limit on all of them would be used up."""
    async with trio.open_nursery() as nursery:
        holder, address = await start(nursery)
        for _ in range(18):
            idler, _ = await start(nursery, dht_mode="client")
            await idler.connect(address)
            for _ in range(4):
                with suppress(PeerLost):  # the fifth: it keeps one of its own
                    await idler.open_stream(holder.peer_id, DHT_PROTOCOL)
        provider, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(provider))
        with trio.fail_after(4):
            assert await provider.announce([KEY]) == 1
        nursery.cancel_scope.cancel()
