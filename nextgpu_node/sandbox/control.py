"""The control socket between the daemon and its zygote: one packet, one message.

SEQPACKET pair;  u32 length of head (big-endian) ‖ head (JSON) ‖ tail      descriptors beside it

daemon -> zygote   {"spawn": id, "spare_uid": n}  tail: plan
                   descriptors: the worker's socket, then the directory of its cgroup (v2)
                   {…, "task": "probe"}   it attacks its walls and serves no unit
                   {…, "task": "card"}    it clears a card, or looks whether it is clear
                   {"kill": id}         where the worker has a user that is not the daemon's
zygote -> daemon   {"ready": runtime, "layout": {…}, "surroundings": {…} of a service, or null}
                   {"failed": sentence}                     the worker module can not be loaded
                   {"spawned": id, "pid": n}                descriptor: its pidfd
                   {"refused": id, "error": sentence}       the fork itself failed
                   {"exited": id, "status": n, "wall_s": f, "cpu_s": f, "peak_rss_bytes": n}
"""

from __future__ import annotations

import array
import json
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final

MAX_PACKET_BYTES: Final = 128 * 1024
MAX_DESCRIPTORS: Final = 8
_LENGTH: Final = struct.Struct(">I")
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)

Head = dict[str, Any]
Ancillary = list[tuple[int, int, bytes]]


def pack(head: Head, tail: bytes = b"") -> bytes:
    encoded = json.dumps(head, separators=(",", ":")).encode()
    return _LENGTH.pack(len(encoded)) + encoded + tail


def unpack(packet: bytes) -> tuple[Head, bytes]:
    (length,) = _LENGTH.unpack_from(packet)
    start = _LENGTH.size
    head: Head = json.loads(packet[start : start + length])
    return head, packet[start + length :]


def pack_descriptors(fds: Sequence[int]) -> Ancillary:
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]


def unpack_descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
