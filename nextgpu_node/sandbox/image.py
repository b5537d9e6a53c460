"""The launcher's memory as a file that its workers share: small workers, quick forks.

torch and what it imports are 200 MB of private memory.  A fork copies the page tables of it all,
and each worker then maps all of it, though it reads little.  A mapping of a file is not copied: a
page is mapped when it is touched, and there is one copy of it however many workers live.  So the
private regions are written into a memory file, sealed, and mapped over themselves, private as
before: who writes to a page gets its own copy, and nothing ever goes back into the file.

Between the copy and the mapping of a region nothing may change in it, and the interpreter's own
objects live there: both system calls of each region are made by the machine code below, which
touches nothing but its registers and its table.  Elsewhere than on x86-64, or where a call is
refused, the memory stays as it is.  Source: memfd_create(2), mmap(2), pwrite(2)

    table   (address, length, offset in the file), three 64-bit words a region
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MIB: Final = 1024 * 1024
# Smaller ones are not worth a mapping of their own.
_SMALLEST_BYTES: Final = 256 * 1024
# glibc: what it maps by itself, it may also move and enlarge, which a mapping of a file can not
# follow.  32 MiB is the largest threshold that it takes, so that all of a preload is in its heap.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_THRESHOLD_BYTES: Final = 32 * _MIB
_SEALS: Final = 0x0001 | 0x0002 | 0x0004 | 0x0008  # SEAL, SHRINK, GROW, WRITE

# int copy_and_map(table: rdi, count: rsi, descriptor: rdx), System V calling convention.
# fmt: off
_COPY_AND_MAP: Final = bytes.fromhex(
    "53 55 4154 4155"              # push rbx, rbp, r12, r13
    "4889fb 4989f4 4989d5"         # rbx = table; r12 = count; r13 = descriptor
    "4d85e4 745a"                  # next: if not r12: done
    "31ed"                         #   rbp = 0: bytes of this region that are written
    "488b33 4801ee"                #   copy: rsi = address + rbp
    "488b5308 4829ea 741b"         #     rdx = length - rbp; if 0: map
    "4c8b5310 4901ea"              #     r10 = offset + rbp
    "4c89ef b812000000 0f05"       #     rax = pwrite64(descriptor, rsi, rdx, r10)
    "4885c0 7e37 4801c5 ebd6"      #     if rax <= 0: fail; rbp += rax; copy
    "488b3b 488b7308"              #   map: rdi = address; rsi = length
    "ba03000000 41ba12000000"      #     PROT_READ | PROT_WRITE; MAP_PRIVATE | MAP_FIXED
    "4d89e8 4c8b4b10"              #     descriptor; offset
    "b809000000 0f05"              #     rax = mmap(…)
    "483b03 750d"                  #     if rax != address: fail
    "4883c318 49ffcc eba1"         #   table += 24; count -= 1; next
    "31c0 eb05"                    # done: 0
    "b801000000"                   # fail: 1
    "415d 415c 5d 5b c3"           # pop r13, r12, rbp, rbx; return
)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Region:
    start: int
    end: int
    resident_bytes: int

    @property
    def size(self) -> int:
        return self.end - self.start


def prepare() -> None:
    """Before anything large is allocated: have the C library keep it all in its heap."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD_BYTES)


def share_memory() -> int:
    """Put this process's private memory into a file that its forks share; the bytes of the file.

    0 where that is not possible here: nothing has changed then.  For a process with one thread.
    """
    if platform.machine() != "x86_64":
        return 0
    regions = [region for region in _private_regions() if _is_worth_it(region)]
    table, size = bytearray(), 0
    for region in regions:
        table += struct.pack("<QQQ", region.start, region.size, size)
        size += region.size
    try:
        return size if _copy_and_map(bytes(table), len(regions), size) else 0
    except OSError:
        return 0


def _is_worth_it(region: _Region) -> bool:
    # A region that is mostly untouched would take more memory as a file.
    return region.size >= _SMALLEST_BYTES and 2 * region.resident_bytes > region.size


def _copy_and_map(table: bytes, count: int, size: int) -> bool:
    descriptor = os.memfd_create("nextgpu-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with mmap.mmap(-1, len(table), private) as rows, mmap.mmap(-1, 4096, private) as code:
            rows.write(table)
            code.write(_COPY_AND_MAP)
            done = _call(code, rows, count, descriptor)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return done
    finally:
        os.close(descriptor)


def _call(code: mmap.mmap, rows: mmap.mmap, count: int, descriptor: int) -> bool:
    of_code, of_rows = (ctypes.c_char.from_buffer(buffer) for buffer in (code, rows))
    address = ctypes.addressof(of_code)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if libc.mprotect(address, 4096, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
            return False
        # PYFUNCTYPE keeps the interpreter lock: nothing else runs meanwhile.
        kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
        return bool(kind(address)(ctypes.addressof(of_rows), count, descriptor) == 0)
    finally:
        del of_code, of_rows


def _private_regions() -> Iterator[_Region]:
    """Anonymous memory of this process that can be written, its stack excepted."""
    span, anonymous = (0, 0), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            start, end = fields[0].split("-")
            span = (int(start, 16), int(end, 16))
            anonymous = fields[1] == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]")
        elif anonymous and fields[0] == "Rss:":
            yield _Region(*span, int(fields[1]) * 1024)
