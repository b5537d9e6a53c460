"""All that a process of the fork server in bench_sandbox.py imports and does."""

from __future__ import annotations

from multiprocessing.connection import Connection


def say_hello(pipe: Connection) -> None:
    pipe.send(b"hello")
