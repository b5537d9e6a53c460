"""`nextgpu`: one process for one command.

    main -> global options (anywhere on the line) -> the command's own module, loaded only now

Exit codes: 0 ok, 1 the job failed, 2 usage, 3 no daemon, 4 no matching peer, 5 refused by policy,
6 timeout, 7 integrity, 130 interrupted.  What a user did wrong ends in one line on stderr; only a
fault of our own ends in a traceback.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import cyclopts
from cyclopts import App, Parameter

from nextgpu_node.cli.context import Context
from nextgpu_node.cli.output import SCHEMA, Output, printable
from nextgpu_node.errors import IntegrityError, NextGPUError, UsageError
from nextgpu_protocol.errors import RemoteProtocolError

INTERRUPTED: Final = 130
_BROKEN_PIPE: Final = 1
# What the extra "worker" of the package brings (pyproject.toml).
_OPTIONAL_MODULES: Final = ("torch", "numpy", "safetensors")

# The modules are loaded when their command is called: torch takes seconds, and --help must not.
_COMMANDS: Final = (
    ("up", "starting:up", "Start the node here; ask once whether this machine lends its device."),
    ("status", "node:status", "What the node is doing now."),
    ("gpus", "node:gpus", "The devices of this machine."),
    ("peers", "network:peers", "Who lends a device now."),
    ("run", "running:run", "Run a program on a peer's device."),
    ("export", "programs:export", "Turn a torch module into a program."),
    ("inspect", "programs:inspect", "Say what a program file holds."),
    ("units", "network:units", "Work units that are here now, lent or borrowed."),
    ("cancel", "network:cancel", "End a work unit."),
    ("invite", "tokens:invite", "Issue a capability token for this node's device."),
    ("invites", "tokens:invites", "The tokens that this node has issued."),
    ("revoke", "tokens:revoke", "Revoke a token that this node has issued."),
    ("doctor", "doctor:doctor", "Check this machine; every problem with its remedy."),
    ("demo", "running:demo", "Lend and borrow on this machine, end to end."),
)
_GROUPS: Final = {
    "share": (
        "Whether this machine lends its device.",
        (
            ("on", "network:share_on", "Lend from now on."),
            ("off", "network:share_off", "Lend no more; running units end."),
        ),
    ),
    "identity": (
        "The key that this node is known by.",
        (
            ("show", "identity:show", "Who this node is."),
            ("rotate", "identity:rotate", "A new key, named by the old one as its successor."),
            ("export", "identity:export", "Write key and successions to a sealed file."),
            ("import", "identity:import_", "Be the node of an exported identity."),
            ("passphrase", "identity:passphrase", "Set, change or remove the passphrase."),
        ),
    ),
    "token": (
        "A capability token that you hold.",
        (
            ("show", "tokens:show", "What a token allows."),
            ("attenuate", "tokens:attenuate", "Make a narrower token out of one, offline."),
        ),
    ),
    "config": (
        "The node's settings.",
        (
            ("show", "settings:show", "Every setting with its value."),
            ("set", "settings:set_", "Change one setting in the settings file."),
            ("path", "settings:path", "Where the settings file is."),
        ),
    ),
}


def main() -> int:
    """The console script.  Returns the exit code."""
    tokens = sys.argv[1:]
    as_json = "--json" in tokens
    try:
        code = _run(tokens)
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
        return _failed(*_sentence_of(exc), as_json=as_json)
    return code


def build_app() -> App:
    """Every command by name, none of them loaded."""
    app = App(
        name="nextgpu",
        help="Lend and borrow GPUs, peer to peer: sealed work units in a sandboxed torch worker.",
        version=_version,
        help_format="plaintext",
        print_error=False,
        exit_on_error=False,
    )
    _add(app, _COMMANDS)
    for name, (summary, commands) in _GROUPS.items():
        group = App(name=name, help=summary)
        _add(group, commands)
        app.command(group)
    return app


def _version() -> str:
    # Imported here: it costs 40 ms.
    from importlib import metadata

    return f"nextgpu {metadata.version('nextgpu-node')}"


def _add(app: App, commands: Sequence[tuple[str, str, str]]) -> None:
    for name, target, summary in commands:
        app.command(f"nextgpu_node.cli.{target}", name=name, help=summary)


def _run(tokens: Sequence[str]) -> int:
    app = build_app()

    @app.meta.default
    def launch(
        *command: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        home: Annotated[
            Path | None, Parameter(help="All files of the node below DIR (NEXTGPU_HOME).")
        ] = None,
        config: Annotated[Path | None, Parameter(help="Another settings file.")] = None,
        json: Annotated[bool, Parameter(negative="", help="One JSON object on stdout.")] = False,
        no_color: Annotated[bool, Parameter(negative="", help="No colours (NO_COLOR).")] = False,
    ) -> int:
        out = Output(json=json, color=not (no_color or os.environ.get("NO_COLOR")))
        return _call(app, command, home, config, out)

    # Else cyclopts would end the process without a word.
    app.meta.suppress_keyboard_interrupt = False
    code: int = app.meta(
        tokens, print_error=False, exit_on_error=False, result_action="return_value"
    )
    return code


def _call(
    app: App, command: Sequence[str], home: Path | None, config: Path | None, out: Output
) -> int:
    function, bound, ignored = app.parse_args(command, print_error=False, exit_on_error=False)
    if "ctx" in ignored:
        bound.arguments["ctx"] = Context.from_options(os.environ, home, config, out)
    result: Any
    if inspect.iscoroutinefunction(function):
        import trio

        result = trio.run(partial(function, *bound.args, **bound.kwargs))
    else:
        result = function(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def _failed(sentence: str, code: int, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"schema": SCHEMA, "error": sentence, "exit_code": code}))
        sys.stdout.flush()
    print(f"nextgpu: {printable(sentence)}", file=sys.stderr)
    return code


def _sentence_of(exc: BaseException) -> tuple[str, int]:
    match exc:
        case NextGPUError():
            return str(exc), exc.exit_code
        case RemoteProtocolError():
            return str(exc), IntegrityError.exit_code
        case cyclopts.UnknownCommandError(unused_tokens=[name, *_]):
            # Its own text would load every command's module to list their names.
            return f"{name!r} is no command.{_nearest(name)}", UsageError.exit_code
        case _:
            return " ".join(str(exc).split()), UsageError.exit_code


def _nearest(name: str) -> str:
    known = [*(command for command, _, _ in _COMMANDS), *_GROUPS]
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


if __name__ == "__main__":
    sys.exit(main())
