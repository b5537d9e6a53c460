"""A TCP proxy on loopback, in threads, that a test can cut as a bad line cuts a connection."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# SO_LINGER with no time: close() sends RST, as a router does that has forgotten a connection.
_ABORT = struct.pack("ii", 1, 0)
_READ_BYTES = 256 * 1024
HOST = "127.0.0.2"


class CutProxy:
    """Forwards `port` of HOST to `target_port` of 127.0.0.1, and counts the bytes that way.

    HOST is another address of loopback, as a router's is another than that of the node behind it.
    """

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server((HOST, port))
        # A line holds little; what two pairs of buffers hold here would be on its way besides.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _READ_BYTES)
        self.port: int = self._listener.getsockname()[1]
        self.target_port = 0
        self.forwarded_bytes = 0
        self.cuts = 0
        self._cut_at: list[int] = []
        self._cuts_for_good = False
        self._is_refusing = False
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, *forwarded_bytes: int, for_good: bool = False) -> None:
        """Cut every connection when so many bytes have gone to the target, once for each.

        `for_good`: and refuse those that come afterwards.
        """
        self._cut_at = sorted(forwarded_bytes)
        self._cuts_for_good = for_good

    def cut(self) -> None:
        """Abort every connection now."""
        with self._lock:
            live, self._live = self._live, set()
            self.cuts += 1
        for sock in live:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def refuse(self, refusing: bool) -> None:
        """Whether connections that come from now on are closed at once."""
        self._is_refusing = refusing

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_refusing:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target_port))
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _READ_BYTES)
            with self._lock:
                self._live |= {near, far}
            for source, sink, counts in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._forward, args=(source, sink, counts), daemon=True
                ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_READ_BYTES):
                sink.sendall(data)
                if counts:
                    self._count(len(data))
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _count(self, size: int) -> None:
        self.forwarded_bytes += size
        if self._cut_at and self.forwarded_bytes >= self._cut_at[0]:
            self._cut_at.pop(0)
            self._is_refusing = self._is_refusing or self._cuts_for_good
            self.cut()


@contextmanager
def cut_proxy(port: int = 0) -> Iterator[CutProxy]:
    proxy = CutProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


def free_port() -> int:
    """A port of loopback that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
