"""Whatever ends a command early, as one line on stderr and an exit code.

Only a fault of our own ends in a traceback.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

import cyclopts

from nextgpu_node.cli.output import SCHEMA, printable
from nextgpu_node.errors import IntegrityError, NextGPUError, UsageError
from nextgpu_protocol.errors import RemoteProtocolError

INTERRUPTED: Final = 130
_BROKEN_PIPE: Final = 1
# What the extra "worker" of the package brings (pyproject.toml).
_OPTIONAL_MODULES: Final = ("torch", "numpy", "safetensors")


def guarded(call: Callable[[], int], commands: Sequence[str] = (), *, as_json: bool) -> int:
    """The exit code of `call`, or of what it raised, which is told."""
    try:
        code = call()
        sys.stdout.flush()
    except BrokenPipeError:
        # `nextgpu peers | head` closed the pipe: nobody is left to tell.  The interpreter would
        # flush once more while it exits, so stdout leads nowhere from here on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED, as_json=as_json)
    except BaseExceptionGroup as group:
        return _failed(*_sentence_of_group(group), as_json=as_json)
    except ImportError as exc:
        return _failed(_sentence_of_missing(exc), UsageError.exit_code, as_json=as_json)
    except (NextGPUError, RemoteProtocolError, cyclopts.CycloptsError) as exc:
        return _failed(*_sentence_of(exc, commands), as_json=as_json)
    return code


def _failed(sentence: str, code: int, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"schema": SCHEMA, "error": sentence, "exit_code": code}))
        sys.stdout.flush()
    print(f"nextgpu: {printable(sentence)}", file=sys.stderr)
    return code


def _sentence_of(exc: BaseException, commands: Sequence[str] = ()) -> tuple[str, int]:
    match exc:
        case NextGPUError():
            return str(exc), exc.exit_code
        case RemoteProtocolError():
            return str(exc), IntegrityError.exit_code
        case cyclopts.UnknownCommandError(unused_tokens=[name, *_]):
            # Its own text would load every command's module to list their names.
            return f"{name!r} is no command.{_nearest(name, commands)}", UsageError.exit_code
        case _:
            return " ".join(str(exc).split()), UsageError.exit_code


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else " `nextgpu --help` lists them."


def _sentence_of_missing(exc: ImportError) -> str:
    """For a submitter that installed without torch; any other missing module is our own fault."""
    root: BaseException = exc
    while root.__cause__ is not None:
        root = root.__cause__
    if not isinstance(root, ImportError) or root.name not in _OPTIONAL_MODULES:
        raise exc
    return f"This command needs {root.name}. Install it: pip install 'nextgpu-node[worker]'"


def _sentence_of_group(group: BaseExceptionGroup[BaseException]) -> tuple[str, int]:
    """One sentence for what several tasks raised; a fault of our own rises as it is."""
    known, unknown = group.split((NextGPUError, RemoteProtocolError, KeyboardInterrupt))
    if unknown is not None:
        raise group
    assert known is not None
    leaves = list(_leaves(known))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return "interrupted", INTERRUPTED
    return _sentence_of(leaves[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found
