"""The filter's verdicts, by running its program as the kernel would: nothing is installed."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from nextgpu_node.sandbox.calls import Vendor, seccomp_rules
from nextgpu_node.sandbox.seccomp import ALLOW, ERRNO, KILL_PROCESS, assemble
from nextgpu_node.sandbox.syscalls import SYSCALLS, number

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386 = 0x40000003
SELF = 1
LOW_BITS = 0xFFFFFFFF


def verdict(
    nr: int,
    *args: int,
    machine: str = "x86_64",
    arch: int | None = None,
    gpu: Vendor | None = None,
    namespaces: bool = True,
) -> int:
    """What the filter of a worker with process id 1 returns for one call."""
    rules = seccomp_rules(namespaces=namespaces, gpu=gpu)
    program = assemble(rules, self_pid=SELF, machine=machine)
    padded = [arg & (2**64 - 1) for arg in (*args, *[0] * (6 - len(args)))]
    arch = ARCH[machine] if arch is None else arch
    data = struct.pack("<IIQ6Q", nr & LOW_BITS, arch, 0, *padded)
    return _run(program, data)


def _run(program: bytes, data: bytes) -> int:
    accumulator, pointer = 0, 0
    while True:
        code, jump_true, jump_false, constant = struct.unpack_from("<HBBI", program, 8 * pointer)
        pointer += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:
                accumulator &= constant
            case 0x15:
                pointer += jump_true if accumulator == constant else jump_false
            case 0x35:
                pointer += jump_true if accumulator >= constant else jump_false
            case 0x06:
                return int(constant)
            case _:
                raise AssertionError(f"no such instruction: {code:#x}")


def call(name: str, *args: int, **options: object) -> int:
    nr = number(name, "x86_64")
    assert nr is not None
    return verdict(nr, *args, **options)  # type: ignore[arg-type]


def refused(code: int) -> int:
    return ERRNO | code


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("name", ["read", "write", "exit_group", "munmap", "lseek"])
def test_plain_calls_are_allowed(name: str, machine: str) -> None:
    nr = number(name, machine)
    assert nr is not None
    assert verdict(nr, 7, 7, 7, 7, 7, 7, machine=machine) == ALLOW


def test_foreign_architecture_and_x32_kill() -> None:
    assert verdict(20, arch=I386) == KILL_PROCESS
    assert verdict(0, arch=ARCH["aarch64"]) == KILL_PROCESS
    assert verdict(0x40000000 | 39) == KILL_PROCESS
    assert verdict(0, machine="aarch64", arch=0x40000028) == KILL_PROCESS  # 32-bit arm


@pytest.mark.parametrize(
    "nr", [41, 42, 46, 47, 53, 57, 58, 59, 101, 155, 165, 272, 298, 308, 310, 317, 321, 322, 323]
)
def test_sockets_processes_namespaces_and_kernel_surfaces_are_refused(nr: int) -> None:
    assert verdict(nr) == refused(errno.EPERM)


def test_unknown_newer_calls_do_not_exist() -> None:
    assert verdict(447) == refused(errno.ENOSYS)
    assert verdict(600) == refused(errno.ENOSYS)


def test_threads_may_be_made_and_processes_may_not() -> None:
    assert call("clone", 0x3D0F00) == ALLOW  # glibc's pthread_create
    assert call("clone", 0x7D0F00) == ALLOW  # with CLONE_DETACHED, as musl asks
    assert call("clone", 17) == refused(errno.EPERM)  # fork: SIGCHLD alone
    assert call("clone", 0x3D0F00 & ~0x10000) == refused(errno.EPERM)  # no CLONE_THREAD
    for namespace in (0x20000, 0x10000000, 0x20000000, 0x40000000):
        assert call("clone", 0x3D0F00 | namespace) == refused(errno.EPERM)
    assert call("clone", 0x3D0F00 | 1 << 33) == refused(errno.EPERM)
    assert call("clone3", 0, 88) == refused(errno.ENOSYS)


def test_nothing_but_plain_sends() -> None:
    assert call("sendto", 3, 0x1000, 10, 0, 0, 0) == ALLOW
    assert call("sendto", 3, 0x1000, 10, 0, 0x1000, 16) == refused(errno.EPERM)
    assert call("sendto", 3, 0x1000, 10, 0, 1 << 32, 0) == refused(errno.EPERM)


def test_signals_reach_the_process_itself_alone() -> None:
    assert call("tgkill", SELF, 1, 6) == ALLOW
    assert call("tgkill", 2, 2, 6) == refused(errno.EPERM)
    assert verdict(62, 1, 9) == refused(errno.EPERM)  # kill


def test_limits_may_be_read_and_not_set() -> None:
    assert call("prlimit64", 0, 7, 0, 0x1000) == ALLOW
    assert call("prlimit64", SELF, 7, 0, 0x1000) == ALLOW
    assert call("prlimit64", 0, 7, 0x1000, 0) == refused(errno.EPERM)
    assert call("prlimit64", 77, 7, 0, 0x1000) == refused(errno.EPERM)


def test_death_signal_dumpability_and_filters_can_not_be_changed() -> None:
    assert call("prctl", 16, 0x1000) == ALLOW  # PR_GET_NAME
    assert call("prctl", 15, 0x1000) == refused(errno.EPERM)  # PR_SET_NAME
    assert call("prctl", 15, 0x1000, gpu="nvidia") == ALLOW
    for option in (1, 4, 22, 24, 36, 38, 0x59616D61):
        assert call("prctl", option) == refused(errno.EPERM)


def test_memory_can_not_be_shared() -> None:
    assert call("mmap", 0, 4096, 3, 0x22) == ALLOW  # private, anonymous
    assert call("mmap", 0, 4096, 1, 0x02) == ALLOW  # private, of a file
    for flags in (0x01, 0x21, 0x23, 0x22 | 0x40000):  # the last: huge pages of the host's pool
        assert call("mmap", 0, 4096, 3, flags) == refused(errno.EPERM)


def test_a_gpu_worker_maps_files_shared_and_anonymous_memory_not() -> None:
    assert call("mmap", 0, 4096, 3, 0x01, gpu="nvidia") == ALLOW
    assert call("mmap", 0, 4096, 3, 0x21, gpu="nvidia") == refused(errno.EPERM)


def test_threads_wait_for_each_other_and_wake_nobody_else() -> None:
    assert call("futex", 0x1000, 128 | 1, 1) == ALLOW  # wake, private
    assert call("futex", 0x1000, 128 | 0, 1) == ALLOW  # wait, private
    assert call("futex", 0x1000, 9 | 256, 1) == ALLOW  # wait until a time of day: pthread_join
    for command in (1, 3, 4, 5, 6, 10):  # wake, requeue, wake_op, locks with priority inheritance
        assert call("futex", 0x1000, command, 1) == refused(errno.EPERM)


def test_nobody_sleeps_who_could_not_be_woken() -> None:
    """libstdc++ waits and wakes without the private bit; where the one is refused, so is both."""
    wait, wake = call("futex", 0x1000, 0, 1), call("futex", 0x1000, 1, 1)
    assert wait == wake == refused(errno.EPERM)


def test_no_advice_that_another_process_could_notice() -> None:
    assert call("madvise", 0x1000, 4096, 4) == ALLOW  # DONTNEED
    for advice in (9, 12, 21, 100):  # REMOVE, MERGEABLE, PAGEOUT, HWPOISON
        assert call("madvise", 0x1000, 4096, advice) == refused(errno.EINVAL)


def test_the_socket_tells_nothing_of_its_other_end() -> None:
    assert call("getsockopt", 3, 1, 3, 0x1000, 0x1000) == ALLOW  # SO_TYPE
    for option in (17, 31, 59, 77):  # PEERCRED, PEERSEC, PEERGROUPS, PEERPIDFD
        assert call("getsockopt", 3, 1, option, 0x1000, 0x1000) == refused(errno.EPERM)
    for name in ("sendto", "recvfrom"):
        assert call(name, 3, 0x1000, 10, 0) == ALLOW
        assert call(name, 3, 0x1000, 10, 1) == refused(errno.EPERM)  # MSG_OOB


def test_files_are_opened_plainly() -> None:
    assert call("openat", -100, 0x1000, 0o2000000) == ALLOW  # O_CLOEXEC
    for flags in (os.O_DIRECT, os.O_SYNC, os.O_PATH):
        assert call("openat", -100, 0x1000, flags) == refused(errno.EPERM)
    for name in ("fsync", "fdatasync", "msync", "statfs"):
        assert call(name, 3) == refused(errno.EPERM)


def test_without_namespaces_a_worker_asks_about_itself_alone_and_changes_no_file() -> None:
    for asked, answer in ((0, ALLOW), (SELF, ALLOW), (2, refused(errno.EPERM))):
        assert call("sched_getaffinity", asked, namespaces=False) == answer
    for name in ("mkdir", "unlink", "rename", "ftruncate", "readlink", "access", "getppid"):
        assert call(name, 0) == ALLOW
        assert call(name, 0, namespaces=False) == refused(errno.EPERM)


def test_terminal_input_can_not_be_faked() -> None:
    assert call("ioctl", 0, 0x5401) == ALLOW  # TCGETS: isatty
    for request in (0x5412, 0x541C, 0x5413 | 1 << 32):  # TIOCSTI, TIOCLINUX
        assert call("ioctl", 0, request) == refused(errno.ENOTTY)
        assert call("ioctl", 0, request, gpu="nvidia") == refused(errno.EPERM)


def test_gpu_requests_are_for_gpu_workers() -> None:
    assert call("ioctl", 4, 0xC020462A) == refused(errno.ENOTTY)
    assert call("ioctl", 4, 0xC020462A, gpu="nvidia") == ALLOW
    assert call("memfd_create", 0, 0) == refused(errno.EPERM)
    assert call("memfd_create", 0, 0, gpu="nvidia") == ALLOW


def test_descriptors_may_not_raise_signals() -> None:
    assert call("fcntl", 3, 4, 0o4000) == ALLOW  # O_NONBLOCK
    assert call("fcntl", 3, 4, 0o20000) == refused(errno.EPERM)  # O_ASYNC
    assert call("fcntl", 3, 8, 1) == refused(errno.EPERM)  # F_SETOWN


def test_every_rule_names_a_known_call() -> None:
    vendors: tuple[Vendor | None, ...] = (None, "nvidia", "amd", "intel")
    for gpu in vendors:
        assert {rule.syscall for rule in seccomp_rules(gpu=gpu)} <= SYSCALLS.keys()


def test_each_vendors_requests_are_its_own() -> None:
    render_node, kfd = 0xC0086409, 0x40084B02
    assert call("ioctl", 4, render_node, gpu="nvidia") == refused(errno.EPERM)
    assert call("ioctl", 4, render_node, gpu="amd") == ALLOW
    assert call("ioctl", 4, render_node, gpu="intel") == ALLOW
    assert call("ioctl", 4, kfd, gpu="amd") == ALLOW
    assert call("ioctl", 4, kfd, gpu="intel") == refused(errno.EPERM)


def test_unknown_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="riscv64"):
        number("read", "riscv64")
