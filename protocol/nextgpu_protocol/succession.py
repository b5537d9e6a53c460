"""Successions: how a node changes its key and stays who it was.  Spec: 15-succession.md

    old key ──signs──► Successor(new key)        new key ──signs──► Predecessor(old key, its hash)

Both signatures or none: alone, the first would let anyone be named heir, and the second would let
anyone claim a name.
"""

from __future__ import annotations

from nacl.signing import SigningKey

from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.envelope import open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerKey
from nextgpu_protocol.messages import (
    SUITE,
    Predecessor,
    Succession,
    Successions,
    Successor,
    check_suite_untrusted,
)


def make_succession(old: SigningKey, new: SigningKey, *, now_ms: int) -> Succession:
    """The two statements that make `new` the successor of `old`."""
    successor = sign_message(Successor(SUITE, bytes(new.verify_key), now_ms), old)
    statement = Predecessor(SUITE, bytes(old.verify_key), successor.hash)
    return Succession(successor.data, sign_message(statement, new).data)


def open_succession_untrusted(link: Succession) -> tuple[PeerKey, PeerKey]:
    """Old key and new key.  Raises RemoteProtocolError."""
    successor = open_envelope_untrusted(Successor, link.successor)
    predecessor = open_envelope_untrusted(Predecessor, link.predecessor)
    check_suite_untrusted(successor.message.suite)
    check_suite_untrusted(predecessor.message.suite)
    named = PeerKey(successor.message.new_key)
    if predecessor.signer != named or predecessor.message.old_key != successor.signer:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "the statements name other keys")
    if predecessor.message.successor_hash != successor.hash:
        raise RemoteProtocolError(ErrorCode.BAD_SIGNATURE, "successor_hash")
    return successor.signer, named


def predecessors_untrusted(data: bytes, peer_key: bytes) -> tuple[PeerKey, ...]:
    """The keys that `peer_key` had before, oldest first, from the body of a SUCCESSIONS frame.

    Raises RemoteProtocolError where the links do not lead, one by one, to `peer_key`.
    """
    links = [
        open_succession_untrusted(link)
        for link in decode_message_untrusted(Successions, data).links
    ]
    keys = [old for old, _ in links]
    for (_, new), following in zip(links, [*keys, peer_key][1:], strict=True):
        if new != following:
            raise RemoteProtocolError(ErrorCode.WRONG_PEER, "a link does not lead to the next")
    if len({*keys, peer_key}) != len(keys) + 1:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "a key comes back")
    return tuple(keys)
