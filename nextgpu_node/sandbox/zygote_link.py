"""The daemon's end of a zygote's control socket (control.py)."""

from __future__ import annotations

import os
import socket
import subprocess

import trio

from nextgpu_node.sandbox import control
from nextgpu_node.sandbox.surroundings import Surroundings
from nextgpu_node.sandbox.zygote_process import start_zygote


class ZygoteLink:
    """The control socket to one zygote, and its process where that is a child of ours."""

    def __init__(
        self, channel: socket.socket, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.process = process
        self.around: Surroundings | None = None  # where it is a service of its own
        self._pidfd = os.pidfd_open(process.pid) if process else None
        channel.setblocking(False)
        self._channel = trio.socket.from_stdlib_socket(channel)
        self._raw = channel
        self._sending = trio.Lock()

    @classmethod
    def start(cls, module: str) -> ZygoteLink:
        process, channel = start_zygote(module)
        return cls(channel, process)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    async def send(self, head: control.Head, tail: bytes, fds: list[int]) -> None:
        async with self._sending:
            await self._channel.sendmsg([control.pack(head, tail)], control.pack_descriptors(fds))

    async def receive(self) -> tuple[control.Head, list[int]] | None:
        """The next message; None once the zygote is gone, or let go of."""
        try:
            packet, ancillary, _, _ = await self._channel.recvmsg(
                control.MAX_PACKET_BYTES, control.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (ConnectionResetError, trio.ClosedResourceError):
            return None
        if not packet:
            return None
        head, _ = control.unpack(packet)
        return head, control.unpack_descriptors(ancillary)

    def order_kill(self, spawn_id: int) -> None:
        """Have the zygote kill its worker: for where this process may not."""
        try:
            self._raw.send(control.pack({"kill": spawn_id}))
        except OSError:
            # Without its daemon a zygote ends, and its worker with it.
            self._channel.close()

    async def end(self) -> None:
        """Let go of it; kill and reap a child.  Idempotent."""
        self._channel.close()
        if self.process is not None and self.process.returncode is None:
            assert self._pidfd is not None
            self.process.kill()
            await trio.lowlevel.wait_readable(self._pidfd)
            self.process.wait()
            os.close(self._pidfd)
