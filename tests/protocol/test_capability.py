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
def test_a_device_has_at_most_ten_keys_and_none_twice(kind: str, total: int) -> None:
    keys = keys_for_capacity(kind, total)
    assert 1 <= len(keys) == len(set(keys)) <= 10


def test_a_key_is_what_the_spec_says() -> None:
    plain = b"NextGPU/1 capability\x00cuda/mem>=24"
    assert keys_for_need("cuda", 30 * GIB) == [hashlib.sha256(plain).digest()]
    assert keys_for_capacity("cuda", 24 * GIB)[-1] == hashlib.sha256(plain).digest()
