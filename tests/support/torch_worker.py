"""A worker module with torch imported: HELLO, then for each DATA frame one answer.

DATA ""      64 bytes of a product of random matrices
DATA name    "ok", or what went wrong, of one of OPERATIONS: the kinds of kernels that torch has
"""

from __future__ import annotations

import ctypes
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
import torch.nn.functional as functional

from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame


def preload() -> str:
    torch.set_num_threads(1)
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    # Imported when they are first called, from files that tier C may not reach below a closed home.
    OPERATIONS["meta kernels"]()
    OPERATIONS["autograd"]()
    return f"torch {torch.__version__}"


def reseed() -> None:
    random.seed(os.urandom(32))
    np.random.seed(int.from_bytes(os.urandom(4)))
    # Not torch.manual_seed: it formats a stack trace for CUDA's lazy start, 2 to 18 ms.
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8)) >> 1)


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    sock.sendall(encode_frame(FrameKind.HELLO, os.urandom(32)))
    decoder = FrameDecoder()
    while data := sock.recv(65536):
        decoder.feed(data)
        for kind, body in decoder:
            if kind is FrameKind.END:
                return
            torch.set_num_threads(2)
            answer = _try(OPERATIONS[body.decode()]) if body else _product()
            sock.sendall(encode_frame(FrameKind.DATA, answer))


def _product() -> bytes:
    return (torch.rand(64, 64) @ torch.rand(64, 64)).numpy().tobytes()[:64]


def _try(operation: Callable[[], torch.Tensor]) -> bytes:
    try:
        result = operation()
    except Exception as exc:  # whatever a refused system call turns into
        return repr(exc).encode()[:4000]
    return b"ok" if bool(torch.isfinite(result.abs().double()).all()) else b"not finite"


def _autograd() -> torch.Tensor:
    weight = torch.rand(64, 64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    (weight @ torch.rand(64, 8)).relu().sum().backward()
    optimizer.step()
    return weight.detach()


def _in_threads() -> torch.Tensor:
    """Threads that are joined again: the one kind of futex call between threads that is shared."""
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(torch.rand(8))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.stack(found)


def _static_variable() -> torch.Tensor:
    """Two threads reach a static variable of C++ at once: the second waits until the first has made
    it.  libtorch's kernels do; libstdc++ wakes over a shared futex (Itanium C++ ABI, 3.3.3)."""
    library = ctypes.CDLL("libstdc++.so.6")
    guard = ctypes.c_int64(0)
    acquired: list[int] = []
    first = library.__cxa_guard_acquire(ctypes.byref(guard))
    second = threading.Thread(
        target=lambda: acquired.append(library.__cxa_guard_acquire(ctypes.byref(guard)))
    )
    second.start()
    time.sleep(0.05)  # it waits by now; were it not, the test would only be weaker
    library.__cxa_guard_release(ctypes.byref(guard))
    second.join(5)
    assert (first, acquired) == (1, [0]), "never woken"
    return torch.ones(1)


def _attention() -> torch.Tensor:
    q = torch.rand(2, 4, 128, 32)
    return functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def _images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64)


OPERATIONS: Final[dict[str, Callable[[], torch.Tensor]]] = {
    "matmul": lambda: torch.rand(512, 512) @ torch.rand(512, 512),
    "bf16 matmul": lambda: torch.rand(256, 256).bfloat16() @ torch.rand(256, 256).bfloat16(),
    "int8 matmul": lambda: torch._int_mm(*[torch.ones(64, 64, dtype=torch.int8)] * 2),
    "convolution": lambda: functional.conv2d(_images(), torch.rand(8, 3, 3, 3)),
    "bf16 convolution": lambda: functional.conv2d(
        _images().bfloat16(), torch.rand(8, 3, 3, 3).bfloat16()
    ),
    "attention": _attention,
    "norms": lambda: functional.layer_norm(functional.gelu(torch.rand(32, 64)), (64,)),
    "fft": lambda: torch.fft.fft2(torch.rand(64, 64)),
    "svd": lambda: torch.linalg.svd(torch.rand(64, 64)).S,
    "solve": lambda: torch.linalg.solve(torch.rand(64, 64) + 64 * torch.eye(64), torch.rand(64)),
    "eigenvalues": lambda: torch.linalg.eigvalsh(torch.eye(64)),
    "large sort": lambda: torch.rand(300_000).sort().values,
    "parallel sum": lambda: torch.rand(4_000_000).sum(),
    "embedding": lambda: functional.embedding(torch.arange(8), torch.rand(64, 32)),
    "meta kernels": lambda: torch.zeros(torch.ones(4, device="meta").add(1).shape),
    "autograd": _autograd,
    "threads": _in_threads,
    "static variable": _static_variable,
    "half": lambda: torch.rand(64, 64).half() @ torch.rand(64, 64).half(),
    "complex": lambda: torch.polar(torch.rand(64), torch.rand(64)),
    "random": lambda: torch.distributions.Normal(0.0, 1.0).sample((64,)),
}
