"""What went wrong in an export, in words about the submitter's own code.  Submitter only.

FILE:LINE in FUNCTION: CODE            the submitter's line, where one is known
  reached LIBRARY FILE:LINE …          where that line went wrong inside a library
  WHAT; REMEDY.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from nextgpu_node.errors import ProgramError

_TORCH = str(Path(torch.__file__).parent) + "/"
_OURS = str(Path(__file__).parent) + "/"
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n[ \t]*([^\n]*)')


# Where torch writes the stack of the traced line into its message.
_INSIDE = re.compile(r"(?:call raised this error|Original traceback):\n(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of code that was running."""

    path: str
    number: int
    function: str
    code: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.number} in {self.function}"
        return f"{place}: {self.code}" if self.code else place

    @property
    def is_machinery(self) -> bool:
        """Of torch, of this room, or of nobody (`<string>`)."""
        return self.path.startswith((_TORCH, _OURS, "<"))

    @property
    def is_library(self) -> bool:
        return self.path.startswith(_LIBRARIES) or "site-packages" in self.path


def lines_of_trace(text: str | None) -> list[Line]:
    """The lines of a formatted stack, outermost first."""
    return [
        Line(path, int(number), function, code.strip())
        for path, number, function, code in _FRAME.findall(text or "")
    ]


def lines_of_error(exc: BaseException) -> list[Line]:
    """The lines that were running when `exc` was raised, outermost first."""
    return [
        Line(frame.filename, frame.lineno or 0, frame.name, frame.line or "")
        for frame in traceback.extract_tb(exc.__traceback__)
    ]


def describe_place(lines: Sequence[Line], layer: str = "") -> str:
    """The submitter's innermost line, and the library's line that it led to, if it did."""
    shown = [line for line in lines if not line.is_machinery]
    own = [line for line in shown if not line.is_library]
    if not shown:
        return layer or _layer_of_torch(lines) or "an unknown line"
    if not own:
        return str(shown[-1])
    if shown[-1] is own[-1]:
        return str(own[-1])
    return f"{own[-1]}\n  reached {shown[-1]}"


def _layer_of_torch(lines: Sequence[Line]) -> str:
    """The function of torch.nn, where the submitter's model has no line of its own."""
    inside = [line for line in lines if line.path.startswith(f"{_TORCH}nn/")]
    return f"torch.nn, {inside[-1].function}: {inside[-1].code}" if inside else ""


def refuse_line(lines: Sequence[Line], what: str, remedy: str, layer: str) -> NoReturn:
    raise ProgramError(f"{describe_place(lines, layer)}\n  {what}; {remedy}.")


def tracing_failed(exc: Exception) -> ProgramError:
    """The submitter's words for what torch.export raised."""
    lines = lines_of_error(exc)
    text = str(exc).strip()
    if inside := re.search(
        r"(following call raised this error|Original traceback):\n(.*)", text, re.DOTALL
    ):
        lines = lines_of_trace(inside.group(2)) or lines
    for pattern, what, remedy in _KNOWN:
        if re.search(pattern, f"{type(exc).__name__}: {text}"):
            return ProgramError(f"{describe_place(lines)}\n  {what}; {remedy}.")
    reason = text.partition("\n")[0] or type(exc).__name__
    return ProgramError(
        f"{describe_place(lines)}\n  torch.export could not follow the model: "
        f"{type(exc).__name__}: {reason}"
    )


_BRANCH = "torch.where chooses between values; a choice between programs is made before export"
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"specialized integer|int\(\)|Cannot cast FakeTensor|TruncToInt|[Uu]nbacked|"
        r"DataDependentOutputException|DynamicOutputShapeException",
        "could not follow the model: a size or a Python number depends on a tensor's values",
        "keep it a tensor, or pass it as a Python number in the example inputs, which fixes it",
    ),
    (
        r"Could not guard on data-dependent expression",
        "could not follow the model: a Python branch or loop depends on a tensor's values",
        _BRANCH,
    ),
    (
        r"(\.numpy\(\) is not supported|Cannot access data pointer|call numpy\(\))",
        "could not follow the model: a tensor's values are taken out of torch (numpy, pointers)",
        "do this step with torch operators, or before export and pass its result in",
    ),
    (
        r"(Dynamo|dynamo) .*generator|torch\.Generator|FakeScriptObject",
        "could not follow the model: an argument is an object that programs do not carry",
        "pass tensors and plain numbers",
    ),
)
