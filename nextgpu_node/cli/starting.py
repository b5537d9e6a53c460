"""`nextgpu up`: say what would be lent and how, ask once, become the daemon."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Final

from cyclopts import Parameter

from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.output import human_bytes
from nextgpu_node.config import Config, format_size, load_config, set_value
from nextgpu_node.errors import UsageError
from nextgpu_node.hostinfo.devices import Device, choose_device, list_devices
from nextgpu_node.sandbox.probe import SandboxReport, probe

_WHAT_HOLDS: Final = (
    "What a borrower can rely on: a work unit is sealed to the worker process that runs it; our "
    "software keeps nothing of it; the owner of that machine could run a modified node.",
    "What you can rely on: a work unit is data for a fixed table of operators, not code. Its "
    "worker has no network, sees none of your files and is killed when the unit ends.",
)


def up(
    *,
    yes: Annotated[bool, Parameter(negative="", help="Lend without being asked.")] = False,
    share: Annotated[bool | None, Parameter(help="Lend, or do not, until this node stops.")] = None,
    passphrase_fd: Annotated[
        int | None, Parameter(help="Read the identity key's passphrase from this descriptor.")
    ] = None,
    ctx: Ctx,
) -> int:
    """Start the node here, in the foreground.

    The first time it explains what lending means and asks once; the answer goes into the
    settings file.  --yes is that answer; --share and --no-share hold for this run only.
    """
    if yes and share is False:
        raise UsageError("--yes and --no-share contradict each other.")
    config = load_config(ctx.paths, overrides={}, environ=ctx.environ)
    device = choose_device(list_devices(max_age_s=0), config.sharing.device)
    report = probe()
    ctx.out.note(*_explain(device, report, config))
    wanted = share if share is not None else _consent(ctx, config, report, yes=yes)
    overrides = {} if wanted is None else {"sharing.enabled": str(wanted).lower()}
    sys.stderr.flush()
    sys.stdout.flush()
    # This process becomes the daemon, so that signals and the exit code are the daemon's own.
    command = _daemon_command(ctx, overrides)
    if passphrase_fd is not None:
        try:
            os.set_inheritable(passphrase_fd, True)
        except OSError as exc:
            raise UsageError(f"--passphrase-fd {passphrase_fd}: {exc.strerror}.") from exc
        command += ["--passphrase-fd", str(passphrase_fd)]
    os.execv(sys.executable, command)  # noqa: S606


def _explain(device: Device | None, report: SandboxReport, config: Config) -> list[str]:
    """What would be lent, under which isolation, and what that does and does not promise."""
    if device is None:
        return [f"Nothing to lend: there is no device {config.sharing.device!r} here."]
    kind = "cpu (no GPU here)" if device.kind == "cpu" else device.label
    limits = config.sharing
    can = [
        f"Device: {kind}, {device.name}, {human_bytes(device.total_memory_bytes)} in all, "
        f"{human_bytes(device.free_memory_bytes)} free.",
        f"Limits for each work unit: {format_size(limits.max_memory_bytes)} of memory, "
        f"{limits.max_unit_seconds} seconds, {limits.max_concurrent_units} at a time.",
    ]
    if report.tier == "none":
        return [*can, "Isolation: not possible here, so this machine can borrow but not lend."] + [
            f"  {layer} is missing. {remedy}" for layer, remedy in report.missing
        ]
    isolation = f"Isolation: tier {report.tier} ({', '.join(report.layers)})."
    return [*can, isolation, *_WHAT_HOLDS]


def _consent(ctx: Context, config: Config, report: SandboxReport, *, yes: bool) -> bool | None:
    """The owner's decision; None leaves the settings as they are."""
    decided = config.origins["sharing.enabled"] != "default"
    if report.tier == "none" or (decided and not yes):
        return None
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            ctx.out.note(
                "Nobody to ask here: sharing stays off. Say --yes, or run "
                "`nextgpu config set sharing.enabled true`."
            )
            return None
        sys.stderr.write("Lend this device to other people? [y/N] ")
        sys.stderr.flush()
        yes = sys.stdin.readline().strip().lower() in ("y", "yes")
    set_value(ctx.paths.config_file, "sharing.enabled", str(yes).lower())
    ctx.out.note(f"Sharing is {'on' if yes else 'off'}; `nextgpu share on|off` changes it.")
    return yes


def _daemon_command(ctx: Context, overrides: dict[str, str]) -> list[str]:
    command = [sys.executable, "-m", "nextgpu_node.daemon.main"]
    if ctx.home is not None:
        command += ["--home", str(ctx.home)]
    if ctx.config_file is not None:
        command += ["--config", str(ctx.config_file)]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    return command
