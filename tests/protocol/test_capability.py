"""Whoever can fill a need is found under the keys that the need looks up."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.capability import BUCKETS_GIB, keys_for_capacity, keys_for_need
from nextgpu_protocol.limits import GIB, MAX_MEMORY_BYTES

kinds = st.sampled_from(["cpu", "cuda"])
sizes = st.integers(0, MAX_MEMORY_BYTES) | st.sampled_from(BUCKETS_GIB).map(lambda b: b * GIB)


@given(kinds, sizes, st.data())
def test_every_device_that_fills_a_need_is_found(
    kind: str, total_bytes: int, data: st.DataObject
) -> None:
    needed = data.draw(st.integers(0, total_bytes))
    for wanted in (kind, "any"):
        assert set(keys_for_need(wanted, needed)) & set(keys_for_capacity(kind, total_bytes))


@given(kinds, kinds, sizes, sizes)
def test_no_device_is_found_under_another_kind(a: str, b: str, total: int, needed: int) -> None:
    shared = set(keys_for_need(a, needed)) & set(keys_for_capacity(b, total))
    assert a == b or not shared


@given(kinds, sizes, sizes)
def test_what_is_found_is_at_most_one_bucket_too_small(kind: str, total: int, needed: int) -> None:
    if set(keys_for_need(kind, needed)) & set(keys_for_capacity(kind, total)):
        larger = [b * GIB for b in BUCKETS_GIB if b * GIB > total]
        assert not larger or needed < larger[0]


@given(kinds, sizes)
def test_a_device_has_three_keys_and_a_need_at_most_four(kind: str, size: int) -> None:
    assert len(set(keys_for_capacity(kind, size))) == 3
    assert 1 <= len(keys_for_need(kind, size)) <= 4


@given(kinds, sizes, sizes)
def test_no_device_is_found_twice_by_one_need(kind: str, total: int, needed: int) -> None:
    assert len(set(keys_for_need(kind, needed)) & set(keys_for_capacity(kind, total))) <= 1


def test_a_key_is_what_the_spec_says() -> None:
    def key(text: bytes) -> bytes:
        return hashlib.sha256(b"NextGPU/1 capability\x00" + text).digest()

    assert keys_for_need("cuda", 30 * GIB) == [key(b"cuda/mem=24..80")]
    assert keys_for_need("cpu", 0) == [key(b"cpu/mem=0..80")]
    parts = (b"cuda/mem=12..12", b"cuda/mem=16..16", b"cuda/mem=24..80")
    assert keys_for_need("cuda", 12 * GIB) == [key(text) for text in parts]
    ranges = (b"cuda/mem=0..80", b"cuda/mem=24..80", b"cuda/mem=24..24")
    assert keys_for_capacity("cuda", 24 * GIB) == [key(text) for text in ranges]
