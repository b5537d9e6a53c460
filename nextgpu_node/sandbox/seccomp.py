"""Seccomp: an allow-list of system calls -> a classic BPF program.  Source: seccomp(2)

    other architecture, x32            kill the process
    call in the list, arguments fit    allow
    call in the list, arguments differ its own errno
    clone3 and everything unknown      ENOSYS, so that libraries fall back
    the rest                           EPERM

seccomp_data:  u32 nr ‖ u32 arch ‖ u64 instruction_pointer ‖ u64 args[6]     little endian
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from nextgpu_node.sandbox.syscalls import MACHINE, number

ALLOW: Final = 0x7FFF0000
ERRNO: Final = 0x00050000
KILL_PROCESS: Final = 0x80000000

_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT: Final = 0x40000000

_LD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JEQ: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JGE: Final = 0x35
_RET: Final = 0x06
_ARGS_OFFSET: Final = 16

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


@dataclass(frozen=True, slots=True)
class Check:
    """`argument & mask == value`, on the whole 64-bit register."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class Rule:
    """A call that is allowed: always, or where all checks of one alternative hold."""

    syscall: str
    alternatives: tuple[tuple[Check, ...], ...] = ()
    otherwise: int = errno.EPERM


# Where a filter must name the process itself: its id is known only after the fork.
SELF_PID: Final = -1


@lru_cache(maxsize=8)
def assemble(rules: tuple[Rule, ...], *, self_pid: int, machine: str = MACHINE) -> bytes:
    """The BPF program for `rules`; calls that `machine` does not have are left out."""
    program: list[_Instruction] = [
        (_LD_WORD, 0, 0, 4),
        (_JEQ, 1, 0, _AUDIT_ARCH[machine]),
        (_RET, 0, 0, KILL_PROCESS),
        (_LD_WORD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, _X32_BIT), (_RET, 0, 0, KILL_PROCESS)]
    for rule in rules:
        nr = number(rule.syscall, machine)
        if nr is not None:
            program += _rule(nr, rule, self_pid)
    program += _if_number_is(_known(number("clone3", machine)), [_errno(errno.ENOSYS)])
    # Landlock's calls are the newest that the list knows; what came later does not exist here.
    newest = _known(number("landlock_restrict_self", machine))
    program += [(_JGE, 0, 1, newest + 1), _errno(errno.ENOSYS), _errno(errno.EPERM)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _rule(nr: int, rule: Rule, self_pid: int) -> list[_Instruction]:
    if not rule.alternatives:
        return _if_number_is(nr, [(_RET, 0, 0, ALLOW)])
    body: list[_Instruction] = []
    for alternative in rule.alternatives:
        body += _alternative(alternative, self_pid)
    return _if_number_is(nr, [*body, _errno(rule.otherwise)])


def _alternative(checks: Iterable[Check], self_pid: int) -> list[_Instruction]:
    """Instructions that allow where every check holds and otherwise run on past their end."""
    body: list[_Instruction] = [(_RET, 0, 0, ALLOW)]
    for check in reversed(list(checks)):
        value = self_pid if check.value == SELF_PID else check.value
        for shift, offset in ((0, 0), (32, 4)):
            mask = check.mask >> shift & 0xFFFFFFFF
            if mask:
                word = _ARGS_OFFSET + 8 * check.argument + offset
                body = _if_word_is(word, mask, value >> shift & 0xFFFFFFFF, body)
    return body


def _if_word_is(offset: int, mask: int, value: int, then: list[_Instruction]) -> list[_Instruction]:
    load: list[_Instruction] = [(_LD_WORD, 0, 0, offset)]
    if mask != 0xFFFFFFFF:
        load.append((_AND, 0, 0, mask))
    return [*load, (_JEQ, 0, len(then), value), *then]


def _if_number_is(nr: int, then: list[_Instruction]) -> list[_Instruction]:
    # The accumulator holds the number; a body that loads an argument always ends in a return.
    return [(_JEQ, 0, len(then), nr), *then]


def _errno(code: int) -> _Instruction:
    return (_RET, 0, 0, ERRNO | code)


def _known(nr: int | None) -> int:
    assert nr is not None
    return nr
