"""systemd as process 1 of namespaces of its own, on this machine's kernel: real units, for tests.

    with systemd_container({"some.service": text}) as container:
        container.run(["systemctl", "start", "some.service"])

Root only.  Everything is gone with it: its mounts are private, its control groups are removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_BOOT_DEADLINE_S = 20
_CGROUPS = Path("/sys/fs/cgroup")
_TARGET = "nextgpu-test.target"
WORKER_GROUP = 985  # the id of the group nextgpu-worker inside

# Runs as process 1 until it becomes systemd.  $1: a directory of ours.
#
# It shares the machine's file system, so nothing of it may be writable, and no unit of the
# distribution may exist: systemd-tmpfiles, for one, would empty the machine's /tmp.
_INNER = f"""
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/test
mount --bind "$1" /run/test
for place in /tmp /var /etc/systemd /usr/lib/systemd/system /usr/lib/systemd/user; do
  mount -t tmpfs -o mode=755 tmpfs $place
done
chmod 1777 /tmp
mkdir -p /var/tmp /var/log /etc/systemd/system
for place in /usr/lib/systemd/system-generators /usr/lib/systemd/system-environment-generators; do
  mount -t tmpfs -o ro tmpfs $place
done
mkdir /run/dev
mount -t tmpfs -o mode=755 tmpfs /run/dev
for node in null zero full random urandom tty; do
  touch /run/dev/$node
  mount --bind /dev/$node /run/dev/$node
done
mkdir /run/dev/shm /run/dev/pts /run/dev/mqueue /run/dev/hugepages
ln -s pts/ptmx /run/dev/ptmx
ln -s /proc/self/fd /run/dev/fd
mount --move /run/dev /dev
hybrid=$(test -d /sys/fs/cgroup/systemd && echo yes || true)
umount -R /sys/fs/cgroup
if [ -n "$hybrid" ]; then
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
  mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
  for controller in memory pids cpu; do
    mkdir /sys/fs/cgroup/$controller
    mount -t cgroup -o $controller cgroup /sys/fs/cgroup/$controller
  done
else
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mount -o remount,bind,ro /sys
cp -r /run/test/units/. /etc/systemd/system/
cp /etc/group /run/test/group
echo 'nextgpu-worker:x:{WORKER_GROUP}:' >> /run/test/group
mount --bind /run/test/group /etc/group
printf 'passwd: files\\ngroup: files\\n' > /run/test/nsswitch.conf
mount --bind /run/test/nsswitch.conf /etc/nsswitch.conf
touch /run/pwd.lock
mount --bind /run/pwd.lock /etc/.pwd.lock
mount -o remount,bind,ro /
mount -o bind,remount,ro /proc/sys 2>/dev/null || mount --bind -o ro /proc/sys /proc/sys
touch /root/written /usr/written /tmp/../etc/written 2>/dev/null && exit 9
test -x /run/test/more && /run/test/more
exec env -i container=nextgpu PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_LOG_TARGET=journal \\
  /lib/systemd/systemd --system --unit={_TARGET} --show-status=no --default-standard-output=null
"""
_EMPTY_TARGETS = ("sysinit", "basic", "sockets", "shutdown", "umount", "slices", "paths", "timers")


def reason_to_skip() -> str:
    """Why there can be no such container here; "" where there can."""
    if os.geteuid() != 0:
        return "only root can start a second systemd"
    if not Path("/lib/systemd/systemd").exists() or shutil.which("nsenter") is None:
        return "systemd or nsenter is not installed"
    return ""


@dataclass(frozen=True)
class Container:
    """A running one; `pid` is its process 1 as seen from here."""

    pid: int
    log: Path

    def run(
        self, argv: Sequence[str], *, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """`argv` inside, as root, in its namespaces."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", "--"]
        return subprocess.run([*enter, *argv], capture_output=True, text=True, timeout=timeout_s)


@contextlib.contextmanager
def systemd_container(units: Mapping[str, str], more: str = "") -> Iterator[Container]:
    """`units`: path below /etc/systemd/system to text.  `more`: a shell script, run before."""
    work = Path(tempfile.mkdtemp(prefix="nextgpu-systemd-"))
    groups = _own_groups(f"nextgpu-test-{os.getpid()}")
    try:
        _write_units(work / "units", {**_targets(), **units})
        (work / "inner").write_text(_INNER)
        if more:
            (work / "more").write_text("#!/bin/sh -e\n" + more)
            (work / "more").chmod(0o755)
        with (work / "log").open("wb") as log:
            outer = subprocess.Popen(
                ["sh", "-e", "-c", _outer(groups, work)], stdout=log, stderr=log, stdin=-3
            )
        try:
            yield _booted(outer, work / "log")
        finally:
            for child in psutil.Process(outer.pid).children():
                child.kill()  # process 1: the kernel ends all the others
            outer.wait()
    finally:
        _remove(groups)
        shutil.rmtree(work)


def _own_groups(name: str) -> list[Path]:
    hierarchies = [p for p in _CGROUPS.iterdir() if (p / "cgroup.procs").exists() and p.is_dir()]
    if (_CGROUPS / "cgroup.procs").exists():
        hierarchies = [_CGROUPS]
    wanted = ("systemd", "unified", "memory", "pids", "cpu", _CGROUPS.name)
    return [path / name for path in hierarchies if path.name in wanted]


def _outer(groups: Sequence[Path], work: Path) -> str:
    moves = "\n".join(f"mkdir -p {group}; echo $$ > {group}/cgroup.procs" for group in groups)
    spaces = "--mount --pid --fork --uts --ipc --cgroup --kill-child"
    return f"{moves}\nexec unshare {spaces} sh {work}/inner {work}"


def _targets() -> dict[str, str]:
    """Those that systemd refers to by itself, with nothing behind them."""
    empty = "[Unit]\nDescription=test\nDefaultDependencies=no\n"
    names = (*(f"{name}.target" for name in _EMPTY_TARGETS), _TARGET)
    return dict.fromkeys(names, empty)


def _write_units(directory: Path, units: Mapping[str, str]) -> None:
    for name, text in units.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _booted(outer: subprocess.Popen[bytes], log: Path) -> Container:
    deadline = time.monotonic() + _BOOT_DEADLINE_S
    while time.monotonic() < deadline and outer.poll() is None:
        for child in psutil.Process(outer.pid).children():
            container = Container(child.pid, log)
            said = container.run(["systemctl", "is-system-running"]).stdout.strip()
            if said in ("running", "degraded"):
                return container
        time.sleep(0.1)
    raise RuntimeError(f"systemd did not start: {log.read_text()[-2000:]}")


def _remove(groups: Sequence[Path]) -> None:
    """Each with all that systemd has made below it."""
    for top in groups:
        for _ in range(100):
            with contextlib.suppress(OSError):
                below = [Path(root) for root, _, _ in os.walk(top, topdown=False)]
                for group in below:
                    group.rmdir()
            if not top.exists():
                break
            time.sleep(0.02)
