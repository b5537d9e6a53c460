"""The filter's verdicts, by running its program as the kernel would: nothing is installed."""

from __future__ import annotations

import errno
import struct

import pytest

from nextgpu_node.sandbox.policy import seccomp_rules
from nextgpu_node.sandbox.seccomp import ALLOW, ERRNO, KILL_PROCESS, assemble
from nextgpu_node.sandbox.syscalls import SYSCALLS, number

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386 = 0x40000003
SELF = 1
LOW_BITS = 0xFFFFFFFF


def verdict(
    nr: int, *args: int, machine: str = "x86_64", arch: int | None = None, gpu: bool = False
) -> int:
    """What the filter of a worker with process id 1 returns for one call."""
    program = assemble(seccomp_rules(with_gpu=gpu), self_pid=SELF, machine=machine)
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
@pytest.mark.parametrize("name", ["read", "write", "futex", "exit_group", "munmap", "recvfrom"])
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
    assert call("prctl", 15, 0x1000) == ALLOW  # PR_SET_NAME
    for option in (1, 4, 22, 24, 36, 38, 0x59616D61):
        assert call("prctl", option) == refused(errno.EPERM)


def test_shared_anonymous_memory_is_refused() -> None:
    assert call("mmap", 0, 4096, 3, 0x22) == ALLOW  # private, anonymous
    assert call("mmap", 0, 4096, 1, 0x01) == ALLOW  # shared, of a file
    assert call("mmap", 0, 4096, 3, 0x21) == refused(errno.EPERM)
    assert call("mmap", 0, 4096, 3, 0x23) == refused(errno.EPERM)  # MAP_SHARED_VALIDATE


def test_terminal_input_can_not_be_faked() -> None:
    assert call("ioctl", 0, 0x5401) == ALLOW  # TCGETS: isatty
    for request in (0x5412, 0x541C, 0x5413 | 1 << 32):  # TIOCSTI, TIOCLINUX
        assert call("ioctl", 0, request) == refused(errno.ENOTTY)
        assert call("ioctl", 0, request, gpu=True) == refused(errno.EPERM)


def test_gpu_requests_are_for_gpu_workers() -> None:
    assert call("ioctl", 4, 0xC020462A) == refused(errno.ENOTTY)
    assert call("ioctl", 4, 0xC020462A, gpu=True) == ALLOW
    assert call("memfd_create", 0, 0) == refused(errno.EPERM)
    assert call("memfd_create", 0, 0, gpu=True) == ALLOW


def test_descriptors_may_not_raise_signals() -> None:
    assert call("fcntl", 3, 4, 0o4000) == ALLOW  # O_NONBLOCK
    assert call("fcntl", 3, 4, 0o20000) == refused(errno.EPERM)  # O_ASYNC
    assert call("fcntl", 3, 8, 1) == refused(errno.EPERM)  # F_SETOWN


def test_every_rule_names_a_known_call() -> None:
    for gpu in (False, True):
        assert {rule.syscall for rule in seccomp_rules(with_gpu=gpu)} <= SYSCALLS.keys()


def test_unknown_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="riscv64"):
        number("read", "riscv64")
