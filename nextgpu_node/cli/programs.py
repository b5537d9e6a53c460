"""Commands about program files: export, inspect."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nextgpu_node.cli.context import Ctx
from nextgpu_node.cli.files import check_writable
from nextgpu_node.errors import NextGPUError, UsageError

if TYPE_CHECKING:
    from torch.nn import Module


def export(
    target: Annotated[str, Parameter(name="MODULE:OBJECT")],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The program file.")],
    example: Annotated[Path, Parameter(help="Example inputs by name, in safetensors.")],
    dynamic: Annotated[
        tuple[str, ...],
        Parameter(help="input:dim=name, a size that may vary; may be repeated."),
    ] = (),
    force: Annotated[bool, Parameter(negative="", help="Replace an existing file.")] = False,
    ctx: Ctx,
) -> int:
    """Turn a torch module of yours into a program: data that any peer can run.

    Your module is imported and run here, on this machine, as your own code.

    Parameters
    ----------
    target
        An nn.Module, or a class or function that gives one without arguments, as
        package.module:name; the current directory is searched first.
    """
    check_writable(output, force=force)
    sizes = _parse_dynamic(dynamic)
    from nextgpu_node.cli.inputs import read_tensors
    from nextgpu_node.graph.export import export as export_program

    examples = read_tensors(example)
    module = _load_module(target)
    program = export_program(module, (), examples, dynamic=sizes or None)
    try:
        program.save(output)
    except OSError as exc:
        raise NextGPUError(f"{output}: can not be written: {exc.strerror}.") from exc
    size = output.stat().st_size
    if ctx.out.json:
        ctx.out.print_json(file=str(output), bytes=size, summary=program.summary())
    else:
        ctx.out.note(*program.summary().splitlines())
        ctx.out.say(f"Wrote {output} ({size} bytes).")
    return 0


def inspect(
    program: Annotated[Path, Parameter(name="FILE")],
    /,
    *,
    size: Annotated[
        tuple[str, ...],
        Parameter(help="name=number, a size to estimate the memory for; may be repeated."),
    ] = (),
    ctx: Ctx,
) -> int:
    """Say what a program file holds: inputs, outputs, operators, sizes, memory.

    Nothing of the program is run.
    """
    sizes = _parse_sizes(size)
    from nextgpu_node.cli.inputs import load_program

    description = load_program(program).describe(sizes)
    if ctx.out.json:
        ctx.out.print_json(file=str(program), bytes=program.stat().st_size, **description.facts())
    else:
        ctx.out.say(*description.lines())
    return 0


def _parse_sizes(options: tuple[str, ...]) -> dict[str, int]:
    """{"batch": 8} of ("batch=8",)."""
    sizes = {}
    for option in options:
        name, equals, number = option.partition("=")
        if not (equals and name and number.isascii() and number.isdigit()):
            raise UsageError(f"--size takes name=number such as batch=8, not {option!r}.")
        sizes[name] = int(number)
    return sizes


def _parse_dynamic(options: tuple[str, ...]) -> dict[str, dict[int, str]]:
    """{"x": {0: "batch"}} of ("x:0=batch",)."""
    sizes: dict[str, dict[int, str]] = {}
    for option in options:
        where, equals, symbol = option.partition("=")
        name, colon, dim = where.rpartition(":")
        if not (equals and colon and name and dim.isdecimal() and symbol.isidentifier()):
            raise UsageError(f"--dynamic takes input:dim=name such as x:0=batch, not {option!r}.")
        sizes.setdefault(name, {})[int(dim)] = symbol
    return sizes


def _load_module(target: str) -> Module:
    """The nn.Module that MODULE:OBJECT names.  The user's own code runs here."""
    from torch import nn

    module_name, colon, attribute = target.partition(":")
    if not (colon and module_name and attribute):
        raise UsageError(f"{target!r} is not MODULE:OBJECT, such as my_models.encoder:Encoder.")
    # As `python -m` does: what lies beside the user is found first.
    sys.path.insert(0, str(Path.cwd()))
    found: Any = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name} has no {attribute!r}.")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        found = _make(found, target)
    if not isinstance(found, nn.Module):
        raise UsageError(f"{target} is a {type(found).__name__}, not an nn.Module.")
    return found.eval()


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            raise UsageError(f"There is no module {name!r} here ({Path.cwd()}).") from exc
        raise UsageError(f"{name} could not be imported: {_last_words(exc)}") from exc
    # Whatever the user's own code raises is theirs to read, in one line.
    except Exception as exc:
        raise UsageError(f"{name} could not be imported: {_last_words(exc)}") from exc


def _make(factory: Any, target: str) -> object:
    try:
        made: object = factory()
    except Exception as exc:
        raise UsageError(f"{target}() failed: {_last_words(exc)}") from exc
    return made


def _last_words(exc: Exception) -> str:
    """The exception and the line that raised it."""
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{type(exc).__name__}: {exc} ({frame.filename}, line {frame.lineno})"
