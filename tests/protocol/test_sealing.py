"""What opens is what was sealed, whole, in order, by the one who holds the key; or nothing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl import bindings as sodium

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind, encode_frame
from nextgpu_protocol.limits import CHUNK_OVERHEAD_BYTES, CHUNK_PLAINTEXT_BYTES
from nextgpu_protocol.records import RECORD_HEAD_BYTES, RecordKind, RecordWriter
from nextgpu_protocol.sealing import (
    PREAMBLE_BYTES,
    STREAM_HEADER_BYTES,
    CiphertextHash,
    KeyPair,
    Opener,
    Sealer,
    StreamKey,
    sealed_size,
    transcript_hash,
)
from tests.protocol import samples
from tests.support.secretstream import (
    P1305,
    Chunk,
    ReferenceStream,
    poly1305_blocks,
    poly1305_terms,
)

TEXTS = [b"first", b"", b"third" * 1000, b"last"]


def sealed(texts: Iterable[bytes] = TEXTS, key: StreamKey | None = None) -> list[bytes]:
    """Every frame body of a whole stream to the worker."""
    sealer = Sealer(key or samples.submitter_keys().inbound)
    *before, last = texts
    chunks = [sealer.seal(text) for text in before]
    return [sealer.preamble, *chunks, sealer.seal(last, final=True)]


def opened(bodies: Iterable[bytes], key: StreamKey | None = None) -> list[bytes]:
    """The texts, the preamble's empty one left out, with the check that END asks for."""
    opener = Opener(key or samples.worker_keys().inbound)
    texts = [opener.open_untrusted(body) for body in bodies]
    opener.check_end_untrusted()
    return texts[1:]


def refused(bodies: Iterable[bytes], key: StreamKey | None = None) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        opened(bodies, key)
    return caught.value.code


# --- both directions ------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=500), min_size=1, max_size=6))
def test_what_is_sealed_opens(texts: list[bytes]) -> None:
    assert opened(sealed(texts)) == texts
    out = sealed(texts, samples.worker_keys().outbound)
    assert opened(out, samples.submitter_keys().outbound) == texts


def test_both_ends_derive_the_same_four_values() -> None:
    ours, theirs = samples.submitter_keys(), samples.worker_keys()
    assert ours == theirs
    keys = [ours.inbound.key, ours.outbound.key]
    assert len({*keys, ours.inbound.commitment, ours.outbound.commitment}) == 4


def test_the_largest_chunk_passes_and_a_byte_more_does_not() -> None:
    text = bytes(CHUNK_PLAINTEXT_BYTES)
    bodies = sealed([text, b""])
    assert len(bodies[1]) == CHUNK_PLAINTEXT_BYTES + CHUNK_OVERHEAD_BYTES
    assert opened(bodies) == [text, b""]
    with pytest.raises(LocalProtocolError):
        Sealer(samples.worker_keys().inbound).seal(text + b"\0")
    assert refused([bodies[0], bytes(len(bodies[1]) + 1)]) is ErrorCode.TOO_LARGE


def test_a_sealer_says_nothing_after_its_final_chunk() -> None:
    sealer = Sealer(samples.worker_keys().inbound)
    sealer.seal(b"", final=True)
    with pytest.raises(LocalProtocolError):
        sealer.seal(b"")


# --- changes on the way ---------------------------------------------------------------------


def test_a_stream_cut_anywhere_is_truncated() -> None:
    bodies = sealed()
    for kept in range(len(bodies)):
        assert refused(bodies[:kept]) is ErrorCode.TRUNCATED


def test_any_chunk_dropped_is_refused() -> None:
    bodies = sealed()
    for index in range(1, len(bodies) - 1):
        assert refused(bodies[:index] + bodies[index + 1 :]) is ErrorCode.BAD_SEAL


def test_any_two_chunks_swapped_are_refused() -> None:
    bodies = sealed()
    for i, j in itertools.combinations(range(1, len(bodies)), 2):
        changed = list(bodies)
        changed[i], changed[j] = changed[j], changed[i]
        assert refused(changed) is ErrorCode.BAD_SEAL


def test_any_chunk_repeated_anywhere_is_refused() -> None:
    bodies = sealed()
    for i, j in itertools.product(range(len(bodies)), range(1, len(bodies) + 1)):
        changed = [*bodies[:j], bodies[i], *bodies[j:]]
        assert refused(changed) is ErrorCode.BAD_SEAL


def test_any_changed_bit_is_refused() -> None:
    bodies = sealed([b"some text", b"end"])
    for index, body in enumerate(bodies):
        for bit in range(8 * len(body)):
            changed = bytearray(body)
            changed[bit // 8] ^= 1 << bit % 8
            assert refused([*bodies[:index], bytes(changed), *bodies[index + 1 :]]) is (
                ErrorCode.BAD_SEAL
            )


def test_data_after_the_final_chunk_is_refused_though_libsodium_opens_it() -> None:
    key = samples.worker_keys().inbound
    sealer = Sealer(key)
    bodies = [sealer.preamble, sealer.seal(b"", final=True)]
    # The sender's own state goes on, as a hostile sender's would.
    late = sodium.crypto_secretstream_xchacha20poly1305_push(sealer._state, b"late")
    opener = Opener(key)
    for body in bodies:
        opener.open_untrusted(body)
    plain, _ = sodium.crypto_secretstream_xchacha20poly1305_pull(opener._state, late)
    assert plain == b"late"
    assert refused([*bodies, late]) is ErrorCode.BAD_SEAL


@pytest.mark.parametrize("tag", [1, 2, 4, 255])
def test_a_tag_that_is_not_used_is_refused(tag: int) -> None:
    key = samples.worker_keys().inbound
    sealer = Sealer(key)
    chunk = sodium.crypto_secretstream_xchacha20poly1305_push(
        sealer._state, b"", key.transcript, tag
    )
    assert refused([sealer.preamble, chunk]) is ErrorCode.BAD_SEAL


@given(st.lists(st.binary(max_size=100), max_size=4), st.booleans())
def test_any_bodies_raise_the_one_error(bodies: list[bytes], with_preamble: bool) -> None:
    given_bodies = [sealed()[0], *bodies] if with_preamble else bodies
    assert refused(given_bodies) in {
        ErrorCode.MALFORMED,
        ErrorCode.BAD_SEAL,
        ErrorCode.TRUNCATED,
    }


@pytest.mark.parametrize("size", [0, 1, PREAMBLE_BYTES - 1, PREAMBLE_BYTES + 1, 4113])
def test_a_preamble_has_one_size(size: int) -> None:
    assert refused([bytes(size)]) is ErrorCode.MALFORMED


# --- keys -----------------------------------------------------------------------------------


def test_another_key_does_not_open() -> None:
    stranger = KeyPair(b"x" * 32).worker_keys_untrusted(
        samples.EPHEMERAL.public, samples.TRANSCRIPT
    )
    assert refused(sealed(), stranger.inbound) is ErrorCode.BAD_SEAL


def test_what_the_worker_said_can_not_be_played_back_to_it() -> None:
    assert refused(sealed(key=samples.worker_keys().outbound)) is ErrorCode.BAD_SEAL


@pytest.mark.parametrize(
    "envelopes",
    [
        (samples.SIGNED_OFFER.data, samples.SIGNED_HEADER.data + b"\0"),
        (samples.SIGNED_OFFER.data[1:], samples.SIGNED_HEADER.data),
        (samples.SIGNED_HEADER.data, samples.SIGNED_OFFER.data),
        (samples.SIGNED_OFFER.data + samples.SIGNED_HEADER.data, b""),
    ],
)
def test_another_transcript_does_not_open(envelopes: tuple[bytes, bytes]) -> None:
    other = transcript_hash(*envelopes)
    keys = samples.ONE_TIME.worker_keys_untrusted(samples.EPHEMERAL.public, other)
    assert keys.inbound.key != samples.worker_keys().inbound.key
    assert refused(sealed(), keys.inbound) is ErrorCode.BAD_SEAL


def test_the_first_chunk_is_bound_to_the_transcript_by_itself() -> None:
    key = samples.worker_keys().inbound
    other = StreamKey(key.key, key.commitment, bytes(32))
    assert refused(sealed(), other) is ErrorCode.BAD_SEAL


def test_the_wrong_commitment_is_refused_before_any_chunk() -> None:
    preamble, *_ = sealed()
    for place in range(STREAM_HEADER_BYTES, PREAMBLE_BYTES):
        changed = bytearray(preamble)
        changed[place] ^= 0x80
        opener = Opener(samples.worker_keys().inbound)
        with pytest.raises(RemoteProtocolError) as caught:
            opener.open_untrusted(bytes(changed))
        assert caught.value.code is ErrorCode.BAD_SEAL


LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


@pytest.mark.parametrize("high_bit", [0, 0x80])
@pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
def test_a_point_of_low_order_is_refused_on_both_sides(point: bytes, high_bit: int) -> None:
    key = point[:31] + bytes([point[31] | high_bit])
    derive: list[Callable[[bytes, bytes], object]] = [
        samples.EPHEMERAL.submitter_keys,
        samples.ONE_TIME.worker_keys_untrusted,
    ]
    for keys in derive:
        with pytest.raises(RemoteProtocolError) as caught:
            keys(key, samples.TRANSCRIPT)
        assert caught.value.code is ErrorCode.BAD_SEAL


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_raises_the_one_error(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        samples.ONE_TIME.worker_keys_untrusted(bytes(size), samples.TRANSCRIPT)


def test_secrets_do_not_print() -> None:
    pair = KeyPair(b"k" * 32)
    keys = samples.worker_keys()
    printed = f"{pair!r} {keys!r} {keys.inbound!r} {pair} {keys}"
    for secret in (pair._secret, keys.inbound.key):
        assert secret.hex() not in printed
        assert repr(secret)[2:-1] not in printed


# --- forward secrecy ------------------------------------------------------------------------


def keys_that_an_attacker_can_try(
    secrets: Iterable[bytes], publics: Iterable[bytes]
) -> Iterable[StreamKey]:
    """Every stream key from every secret with every public value, in both roles."""
    for secret, peer in itertools.product(secrets, publics):
        own = sodium.crypto_scalarmult_base(secret)
        agreed = [
            *sodium.crypto_kx_client_session_keys(own, secret, peer),
            *sodium.crypto_kx_server_session_keys(own, secret, peer),
        ]
        for shared, way in itertools.product(agreed, ("in", "out")):
            yield StreamKey.derive(shared, way, samples.TRANSCRIPT)


def opens_the_recording(keys: Iterable[StreamKey], recording: list[bytes]) -> bool:
    for key in keys:
        try:
            opened(recording, key)
        except RemoteProtocolError:
            continue
        return True
    return False


def test_a_recording_and_every_long_term_key_do_not_open_it() -> None:
    """All that lives longer than the unit, in each form in which it could serve X25519."""
    recording = sealed()
    long_term = [samples.SUBMITTER, samples.PROVIDER]
    secrets = []
    for key in long_term:
        seed = bytes(key)
        secrets += [
            seed,
            sodium.crypto_sign_ed25519_sk_to_curve25519(seed + bytes(key.verify_key)),
            sodium.crypto_kx_seed_keypair(seed)[1],
        ]
    publics = [samples.EPHEMERAL.public, samples.ONE_TIME.public]
    publics += [bytes(key.verify_key.to_curve25519_public_key()) for key in long_term]
    assert not opens_the_recording(keys_that_an_attacker_can_try(secrets, publics), recording)
    # The search itself works: either short-lived secret opens it at once.
    for short_lived in (samples.EPHEMERAL._secret, samples.ONE_TIME._secret):
        found = keys_that_an_attacker_can_try([short_lived], publics)
        assert opens_the_recording(found, recording)


def test_the_same_peers_have_new_keys_for_each_unit() -> None:
    first = samples.worker_keys()
    worker, submitter = KeyPair(b"2" * 32), KeyPair(b"3" * 32)
    second = worker.worker_keys_untrusted(submitter.public, samples.TRANSCRIPT)
    assert first.inbound.key != second.inbound.key
    assert refused(sealed(), second.inbound) is ErrorCode.BAD_SEAL


# --- key commitment -------------------------------------------------------------------------


def two_key_chunk(header: bytes, ad: bytes, one: bytes) -> tuple[bytes, bytes]:
    """A second key, and one chunk that opens under both: Poly1305 is linear in each block.

    Len, Grubbs, Ristenpart: Partitioning Oracle Attacks, USENIX Security 2021, section 3.
    """
    first = ReferenceStream(one, header)
    wanted = first.sealed_tag_block(3)[0]
    candidates = (ReferenceStream(n.to_bytes(32), header) for n in range(10_000))
    for number, second in enumerate(candidates):
        if second.sealed_tag_block(3)[0] != wanted:
            continue
        for tweak in range(40):
            chunk = _collide(first, second, ad, tweak.to_bytes(16, "little"))
            if chunk is not None:
                return number.to_bytes(32), chunk
    raise AssertionError("no collision found")


def _collide(
    first: ReferenceStream, second: ReferenceStream, ad: bytes, tweak: bytes
) -> bytes | None:
    """Solve for the second block of a 32-byte text so that both MACs are one number."""
    chunks = [stream.parts(tweak + bytes(16), ad, 3) for stream in (first, second)]
    place = (len(ad) + 64 + 16) // 16
    (a1, c1, s1), (a2, c2, s2) = (_linear(chunk, place) for chunk in chunks)
    for carry in range(-4, 5):
        block = (s2 - s1 + carry * 2**128 - a1 + a2) * pow(c1 - c2, -1, P1305) % P1305
        if not 2**128 <= block < 2**129:
            continue
        text = tweak + (block - 2**128).to_bytes(16, "little")
        one, two = (stream.parts(text, ad, 3) for stream in (first, second))
        if one.data == two.data:
            return one.data
    return None


def _linear(chunk: Chunk, place: int) -> tuple[int, int, int]:
    """MAC = (a + c * block[place]) mod p + s: the three numbers."""
    r, s = poly1305_terms(chunk.mac_key)
    blocks = poly1305_blocks(chunk.authenticated)
    powers = [pow(r, len(blocks) - i, P1305) for i in range(len(blocks))]
    rest = sum(b * p for i, (b, p) in enumerate(zip(blocks, powers, strict=True)) if i != place)
    return rest % P1305, powers[place], s


def test_one_ciphertext_for_two_keys_is_told_apart_by_the_commitment() -> None:
    first = samples.worker_keys().inbound
    header = b"h" * STREAM_HEADER_BYTES
    other_key, chunk = two_key_chunk(header, first.transcript, first.key)
    # The cipher alone accepts it under both keys, as FINAL, with different texts.
    texts = set()
    for key in (first.key, other_key):
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, header, key)
        text, tag = sodium.crypto_secretstream_xchacha20poly1305_pull(
            state, chunk, first.transcript
        )
        assert tag == 3
        texts.add(text)
    assert len(texts) == 2
    # The stream does not: one preamble names one key.
    second = StreamKey(other_key, b"c" * 32, first.transcript)
    for right, wrong in ((first, second), (second, first)):
        bodies = [header + right.commitment, chunk]
        assert len(opened(bodies, right)) == 1
        assert refused(bodies, wrong) is ErrorCode.BAD_SEAL


# --- the stream as the spec writes it -------------------------------------------------------


@given(st.lists(st.binary(max_size=150), min_size=1, max_size=4))
def test_a_second_secretstream_seals_what_opens(texts: list[bytes]) -> None:
    key = samples.worker_keys().inbound
    header = b"h" * STREAM_HEADER_BYTES
    stream = ReferenceStream(key.key, header)
    bodies = [header + key.commitment]
    for index, text in enumerate(texts):
        ad = key.transcript if index == 0 else b""
        bodies.append(stream.push(text, ad, 3 if index == len(texts) - 1 else 0))
    assert opened(bodies) == texts


# --- sizes and hashes -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4090, 4091, 100_000, 262_138, 262_139, 700_000])
def test_the_sealed_size_of_one_flush_is_known_beforehand(size: int) -> None:
    writer = RecordWriter()
    chunks = [*writer.write(RecordKind.STEP, [bytes(size)]), *writer.flush()]
    heads = RECORD_HEAD_BYTES * max(1, -(-size // (CHUNK_PLAINTEXT_BYTES - RECORD_HEAD_BYTES)))
    assert sum(map(len, sealed(chunks))) == sealed_size(size + heads)


def test_two_inputs_of_one_size_class_give_equal_frames_on_the_wire() -> None:
    def wire(size: int) -> list[int]:
        writer = RecordWriter()
        chunks = [*writer.write(RecordKind.STEP, [b"x" * size]), *writer.flush()]
        return [len(encode_frame(FrameKind.DATA, body)) for body in sealed(chunks)]

    assert wire(1) == wire(4000)
    assert wire(300_000) == wire(302_000)
    assert wire(1) != wire(5000)


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_the_hash_of_the_ciphertext_is_that_of_its_frames(bodies: list[bytes]) -> None:
    digest = CiphertextHash()
    for body in bodies:
        digest.update(memoryview(body))
    assert digest.digest() == digest.digest() == sha256_of(bodies)


def test_the_hash_of_the_ciphertext_tells_how_it_was_cut() -> None:
    hashes = {sha256_of(cut) for cut in ([b"ab"], [b"a", b"b"], [b"ab", b""], [])}
    assert len(hashes) == 4


def sha256_of(bodies: list[bytes]) -> bytes:
    """Spec: 55-receipts.md#hashes"""
    sized = b"".join(len(body).to_bytes(8) + body for body in bodies)
    return hashlib.sha256(b"NextGPU/1 ciphertext\0" + sized).digest()
