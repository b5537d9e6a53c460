"""`nextgpu`: one process for one command.

    main -> global options (anywhere on the line) -> the command's own module, loaded only now

Exit codes: 0 ok, 1 the job failed, 2 usage, 3 no daemon, 4 no matching peer, 5 refused by policy,
6 timeout, 7 integrity, 130 interrupted.  What a user did wrong ends in one line on stderr; only a
fault of our own ends in a traceback.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import App, Parameter

from nextgpu_node.cli.context import Context
from nextgpu_node.cli.failures import guarded
from nextgpu_node.cli.output import Output

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
    ("map", "mapping:map_", "Run a program on every file of a directory, over many peers."),
    ("jobs", "jobs:jobs", "Every job of yours."),
    ("show", "jobs:show", "One job: how far it is, and why shards failed."),
    ("logs", "jobs:logs", "What happened to a job."),
    ("results", "jobs:results", "Where the results of a job are, or a copy."),
    ("cancel", "jobs:cancel", "End a job, or a work unit."),
    ("retry", "jobs:retry", "Go on with a job: what failed or is missing."),
    ("rm", "jobs:rm", "Delete jobs with everything in them."),
    ("invite", "tokens:invite", "Issue a capability token for this node's device."),
    ("invites", "tokens:invites", "The tokens that this node has issued."),
    ("revoke", "tokens:revoke", "Revoke a token that this node has issued."),
    ("allow", "serving:allow", "Serve a peer."),
    ("deny", "serving:deny", "Never serve a peer."),
    ("serving", "serving:serving", "Whom this machine serves."),
    ("history", "history:history", "Units of others that ran here."),
    ("doctor", "doctor:doctor", "Check this machine; every problem with its remedy."),
    ("web", "observing:web", "The dashboard of this node, in a browser."),
    ("events", "observing:events", "What changes in the node, as lines of JSON."),
    ("metrics", "observing:metrics", "The node's figures for Prometheus."),
    ("log-level", "observing:log_level", "How much the running node logs."),
    ("bugreport", "bugreport:bugreport", "What helps to find a defect, and nothing that is yours."),
    ("demo", "running:demo", "Lend and borrow on this machine, end to end."),
)
_GROUPS: Final = {
    "share": (
        "Whether this machine lends its device.",
        (
            ("on", "sharing:on", "Lend from now on."),
            ("off", "sharing:off", "Lend no more; running units save their state and end."),
            ("pause", "sharing:pause", "Give the device back, for a time or until resume."),
            ("resume", "sharing:resume", "End a pause, or a drain."),
            ("drain", "sharing:drain", "Take no new units; running ones go on to their end."),
        ),
    ),
    "limits": (
        "What of this machine is lent, and when.",
        (
            ("show", "limits:show", "Every limit with its value."),
            ("set", "limits:set_", "Change limits; they hold at once."),
        ),
    ),
    "service": (
        "The node as a systemd service.",
        (
            ("install", "service:install", "Start it with the machine, or with this user."),
            ("uninstall", "service:uninstall", "Stop and remove it; --purge leaves nothing."),
            ("status", "service:status", "Whether it is installed and runs."),
        ),
    ),
    "network": (
        "Private networks, for those who hold a key.",
        (
            ("create", "private_network:create", "Make a network of your own."),
            ("invite", "private_network:invite", "An invite to this node's network."),
            ("join", "private_network:join", "Join the network of an invite."),
            ("show", "private_network:show", "Which network this node belongs to."),
            ("leave", "private_network:leave", "Go back to the open network."),
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
    "privacy": (
        "What this software leaves of a work unit.",
        (("audit", "privacy:audit", "Send a marked job and search what is left of it."),),
    ),
    "data": (
        "What this software keeps on this machine.",
        (
            ("show", "data:show", "Every kind of data: where, how much, why, how long."),
            ("export", "data:export", "Copy data into one archive."),
            ("delete", "data:delete", "Delete data."),
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
    return guarded(partial(_run, tokens), commands(), as_json="--json" in tokens)


def commands() -> list[str]:
    """Every name that may follow `nextgpu`."""
    return [*(command for command, _, _ in _COMMANDS), *_GROUPS]


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


if __name__ == "__main__":
    sys.exit(main())
