"""scripts/bench protocol: messages each second, and the handshake to the first sealed byte.

messages    each type encoded, decoded, signed, opened; beside the bare primitive in the same run
framing     small frames cut out of a connection's bytes
handshake   both ends' arithmetic alone; and over loopback, from a connected peer's open stream to
            the first byte that the worker sealed, through a real provider
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import trio

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from nextgpu_protocol.checks import (  # noqa: E402
    check_header_untrusted,
    check_offer_untrusted,
    check_request_untrusted,
)
from nextgpu_protocol.codec import decode_message_untrusted, encode_message  # noqa: E402
from nextgpu_protocol.envelope import TYPE_NAMES, open_envelope_untrusted, sign_message  # noqa: E402
from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame  # noqa: E402
from nextgpu_protocol.limits import MIB  # noqa: E402
from nextgpu_protocol.messages import Offer, UnitHeader, UnitRequest  # noqa: E402
from nextgpu_protocol.sealing import Opener, Sealer, transcript_hash  # noqa: E402
from tests.protocol import samples  # noqa: E402
from tests.support.nodes import network_of_three  # noqa: E402
from tests.support.raw_peer import RawPeer, raw_peer  # noqa: E402

SECONDS = 0.4
ROUNDS = 5
HANDSHAKES = 20
MESSAGES = (
    samples.REQUEST,
    samples.OFFER,
    samples.HEADER,
    samples.RECEIPT,
    samples.ACK,
    samples.CAPACITY,
)


def protocol(settings: dict[str, str]) -> dict[str, Any]:
    """All figures.  `settings` are those of a provider that other benchmarks use too."""
    report = {
        "primitives_per_second": primitives(),
        "messages_per_second": {TYPE_NAMES[type(m)]: message(m) for m in MESSAGES},
        "frames_per_second": frames(),
        "handshake_arithmetic_ms": handshake_arithmetic(),
    }
    with network_of_three(settings) as nodes:
        report["handshake_over_loopback"] = trio.run(handshakes, nodes)
    return report


def rate(act: Callable[[], object]) -> int:
    """Calls each second: the best of a few rounds, since others use this machine too."""
    best = 0.0
    for _ in range(ROUNDS):
        calls, began_s = 0, time.perf_counter()
        while (spent_s := time.perf_counter() - began_s) < SECONDS / ROUNDS:
            for _ in range(20):
                act()
            calls += 20
        best = max(best, calls / spent_s)
    return round(best)


def primitives() -> dict[str, int]:
    """What the libraries do alone, on a message of a request's size."""
    data = encode_message(samples.REQUEST)
    plain = msgpack.unpackb(data)
    key = samples.SUBMITTER
    signed = key.sign(data)
    return {
        "ed25519_sign": rate(lambda: key.sign(data)),
        "ed25519_verify": rate(lambda: key.verify_key.verify(signed)),
        "x25519_kx": rate(lambda: samples.EPHEMERAL.submitter_keys(samples.ONE_TIME.public, b"")),
        "msgpack_pack": rate(lambda: msgpack.packb(plain)),
        "msgpack_unpack": rate(lambda: msgpack.unpackb(data)),
    }


def message(value: Any) -> dict[str, int]:
    cls, data = type(value), encode_message(value)
    envelope = sign_message(value, samples.SUBMITTER).data
    return {
        "bytes": len(data),
        "encode": rate(lambda: encode_message(value)),
        "decode": rate(lambda: decode_message_untrusted(cls, data)),
        "sign": rate(lambda: sign_message(value, samples.SUBMITTER)),
        "open": rate(lambda: open_envelope_untrusted(cls, envelope)),
    }


def frames() -> int:
    """Frames of 1 KiB, in reads of 64."""
    read = encode_frame(FrameKind.DATA, bytes(1024)) * 64

    def cut() -> None:
        decoder = FrameDecoder()
        decoder.feed(read)
        for _ in decoder:
            pass

    return 64 * rate(cut)


def handshake_arithmetic() -> dict[str, float]:
    """Everything that both ends compute from the request to the first opened chunk."""
    whole_s = 1 / rate(_handshake)
    alone = primitives()
    signs, verifies, agreements = 3, 5, 2
    parts_s = (
        signs / alone["ed25519_sign"]
        + verifies / alone["ed25519_verify"]
        + agreements / alone["x25519_kx"]
    )
    return {
        "whole": round(whole_s * 1e3, 3),
        "of_which_public_key_primitives": round(parts_s * 1e3, 3),
        "fraction_in_primitives": round(parts_s / whole_s, 2),
    }


def _handshake() -> bytes:
    """Three signatures; the provider opens two, the submitter one, the worker two."""
    now = samples.NOW_MS
    request = sign_message(samples.REQUEST, samples.SUBMITTER)
    asked = open_envelope_untrusted(UnitRequest, request.data)
    check_request_untrusted(asked, bytes(samples.PROVIDER.verify_key), now_ms=now)
    offer = sign_message(samples.OFFER, samples.PROVIDER)
    offered = open_envelope_untrusted(Offer, offer.data)
    check_offer_untrusted(offered, request, bytes(samples.PROVIDER.verify_key), now_ms=now)
    header = sign_message(samples.HEADER, samples.SUBMITTER)
    taken = open_envelope_untrusted(UnitHeader, header.data)
    check_header_untrusted(taken, asked, offer, now_ms=now)
    for cls, data in ((Offer, offer.data), (UnitHeader, header.data)):
        open_envelope_untrusted(cls, data)
    transcript = transcript_hash(offer.data, header.data)
    ours = samples.EPHEMERAL.submitter_keys(samples.ONE_TIME.public, transcript)
    theirs = samples.ONE_TIME.worker_keys_untrusted(samples.EPHEMERAL.public, transcript)
    sealer, opener = Sealer(theirs.outbound), Opener(ours.outbound)
    opener.open_untrusted(sealer.preamble)
    return opener.open_untrusted(sealer.seal(bytes(4096)))


async def handshakes(nodes: Any) -> dict[str, Any]:
    """Milliseconds from the open stream on: the offer, and the first byte that was sealed."""
    provider = nodes.provider.ready
    seconds: dict[str, list[float]] = {"offer": [], "first_sealed_byte": []}
    async with raw_peer(provider.peer_id, provider.address) as peer:
        for _ in range(HANDSHAKES):
            await nodes.wait_idle()
            await trio.sleep(0.3)  # a warm worker is what is measured
            await one_handshake(peer, seconds)
    return {name: milliseconds(values) for name, values in seconds.items()}


async def one_handshake(peer: RawPeer, seconds: dict[str, list[float]]) -> None:
    unit = await peer.open()
    began_s = time.perf_counter()
    offer = await unit.offer(memory_bytes=64 * MIB)
    seconds["offer"].append(time.perf_counter() - began_s)
    await unit.accept(offer)
    unit.opener.open_untrusted(await unit.frames.expect_untrusted(FrameKind.DATA))
    seconds["first_sealed_byte"].append(time.perf_counter() - began_s)
    await unit.send(FrameKind.CANCEL)
    await unit.answers()
    await unit.stream.aclose()


def milliseconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p90 = ordered[round(0.9 * (len(ordered) - 1))]
    return {"p50_ms": round(statistics.median(ordered) * 1e3, 2), "p90_ms": round(p90 * 1e3, 2)}
