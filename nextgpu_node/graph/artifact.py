"""A program with its tensors, and the file that holds both.  Spec: 60-program.md#file

    "NextGPU program\\n" ‖ u64 program bytes ‖ u64 constants bytes ‖ u64 carry bytes (big-endian)
    ‖ program (msgpack) ‖ constants (safetensors image) ‖ carry (safetensors image)

The whole file is data: loading it imports nothing and runs nothing.
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.describe import Description, describe
from nextgpu_node.graph.tensors import (
    SymbolBinding,
    TensorImageReader,
    encode_tensors,
    image_bytes,
    spec_of,
)
from nextgpu_protocol.errors import LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.program import (
    ProgramSpec,
    TensorSpec,
    decode_program_untrusted,
    encode_program,
)
from nextgpu_protocol.program_limits import MAX_PROGRAM_BYTES

MAGIC = b"NextGPU program\n"
_LENGTHS = struct.Struct(">QQQ")
_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A program, its constants and the carry before the first step; tensors by name."""

    spec: ProgramSpec
    constants: dict[str, torch.Tensor]
    carry: dict[str, torch.Tensor]

    @classmethod
    def from_parts(
        cls,
        spec: ProgramSpec,
        constants: Mapping[str, torch.Tensor] | None = None,
        carry: Mapping[str, torch.Tensor] | None = None,
    ) -> Program:
        """Check that the parts belong together.  ProgramError where they do not."""
        program = cls(spec, dict(constants or {}), dict(carry or {}))
        try:
            encode_program(spec)
            _check_section(spec.constants, program.constants)
            if program.carry or spec.init is None:
                _check_section(spec.carry, program.carry)
        except (LocalProtocolError, RemoteProtocolError) as exc:
            raise ProgramError(f"The parts do not make a program: {exc}") from exc
        return program

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file at `path` in one step: it is there complete, or not at all.

        Raises OSError where the disk says no.
        """
        final = Path(path)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
        try:
            with temporary.open("xb") as file:
                self._write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, file: BinaryIO) -> None:
        encoded = encode_program(self.spec)
        lengths = (len(encoded), image_bytes(self.constants), image_bytes(self.carry))
        file.write(MAGIC + _LENGTHS.pack(*lengths) + encoded)
        for tensors in (self.constants, self.carry):
            file.writelines(encode_tensors(tensors))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read a file that anyone may have written.

        Takes no more memory than the file has bytes.  ProgramError says what is wrong with it,
        or why it can not be read.
        """
        descriptor = _open_untrusted(path)
        with os.fdopen(descriptor, "rb") as file:
            try:
                return cls._read(file, os.fstat(descriptor).st_size)
            except (LocalProtocolError, RemoteProtocolError) as exc:
                raise ProgramError(f"{path}: is not a program that can be used: {exc}") from exc
            except OSError as exc:
                raise ProgramError(f"{path}: can not be read: {exc.strerror}.") from exc

    @classmethod
    def _read(cls, file: BinaryIO, size: int) -> Program:
        head = file.read(len(MAGIC) + _LENGTHS.size)
        if len(head) != len(MAGIC) + _LENGTHS.size or not head.startswith(MAGIC):
            raise ProgramError("This is not a NextGPU program file.")
        program, constants, carry = _LENGTHS.unpack(head[len(MAGIC) :])
        if len(head) + program + constants + carry != size or program > MAX_PROGRAM_BYTES:
            raise ProgramError("The program file is cut short or has bytes too many.")
        spec = decode_program_untrusted(file.read(program))
        carry_specs = spec.carry if carry > _EMPTY_IMAGE_BYTES or spec.init is None else ()
        return cls(
            spec,
            _read_image(file, spec.constants, constants),
            _read_image(file, carry_specs, carry),
        )

    def describe(self, sizes: Mapping[str, int] | None = None) -> Description:
        """What the program holds, and the memory that a step of these sizes needs.

        `sizes`: of the symbols, by name; those left out are as small as is allowed.  ProgramError
        where no worker would run the program, or a size is not one of its own.
        """
        return describe(self.spec, sizes)

    def summary(self, sizes: Mapping[str, int] | None = None) -> str:
        """`describe`, as several lines for people."""
        return "\n".join(self.describe(sizes).lines())


def _open_untrusted(path: str | os.PathLike[str]) -> int:
    """A descriptor of a regular file."""
    try:
        # Without O_NONBLOCK a named pipe in place of the file would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ProgramError(f"{path}: can not be read: {reason}.") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ProgramError(f"{path}: is not a regular file.")
    return descriptor


_EMPTY_IMAGE_BYTES = image_bytes({})


def _check_section(specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]) -> None:
    binding = SymbolBinding()
    if [spec.name for spec in specs] != list(tensors):
        raise LocalProtocolError("names differ from the declared ones")
    for spec in specs:
        tensor = tensors[spec.name]
        if spec_of(spec.name, tensor).dtype != spec.dtype:
            raise LocalProtocolError(f"{spec.name} has another dtype than declared")
        binding.match_untrusted(spec, tensor.shape)


def _read_image(
    file: BinaryIO, expected: Sequence[TensorSpec], length: int
) -> dict[str, torch.Tensor]:
    reader = TensorImageReader(expected, max_bytes=length)
    buffer = memoryview(bytearray(min(_PIECE_BYTES, length)))
    while length:
        count = file.readinto(buffer[: min(len(buffer), length)])  # type: ignore[attr-defined]
        if not count:
            raise ProgramError("The program file is cut short.")
        reader.feed(buffer[:count])
        length -= count
    return reader.finish()
