"""The shared memory image: the same content, in one copy, and private to whoever writes."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")

REPOSITORY = Path(__file__).parents[3]

_PROGRAM = """
import gc, hashlib, os, sys
from nextgpu_node.sandbox import image

def anonymous_kib():
    rows = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Anonymous:"))

image.prepare()
objects = [{str(n): [n, bytes(50)]} for n in range(200_000)]
large = bytearray(os.urandom(1 << 20)) * 20
digest = hashlib.sha256(large).digest()
gc.collect(); gc.freeze()
before = anonymous_kib()
size = image.share_memory()
assert size > 40 << 20, size
assert anonymous_kib() < before / 3, (before, anonymous_kib())
assert hashlib.sha256(large).digest() == digest
assert all(entry[str(n)][0] == n for n, entry in enumerate(objects))
maps = open("/proc/self/maps").read()
assert "nextgpu-image" in maps
assert not any("rw-s" in line for line in maps.splitlines())

# A fork writes to its own copy alone, and a second one sees nothing of it.
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        assert large[0] == digest_of_first
        large[:] = bytes(len(large))
        objects.clear(); objects.extend(range(1000))
        os._exit(0)
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert hashlib.sha256(large).digest() == digest
# The heap goes on growing and shrinking behind the image.
more = [bytearray(3 << 20) for _ in range(30)]
assert not any(any(piece[:4096]) for piece in more)
del more, objects
gc.collect()
assert hashlib.sha256(large).digest() == digest
print("held")
""".replace(
    "assert large[0] == digest_of_first\n", "assert hashlib.sha256(large).digest() == digest\n"
)


def test_memory_is_the_same_and_shared_and_private_to_a_writer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.strip() == "held", done.stderr


def test_elsewhere_memory_stays_as_it_is() -> None:
    program = (
        "import platform; platform.machine = lambda: 'aarch64'\n"
        "from nextgpu_node.sandbox import image\n"
        "print(image.share_memory(), 'nextgpu-image' in open('/proc/self/maps').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "False"], done.stderr
