"""`nextgpu doctor`: every line one fact, every problem one remedy."""

from __future__ import annotations

import dataclasses
from typing import Final

from nextgpu_node.api_types import StatusReply
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.sharing import describe
from nextgpu_node.config import SharingConfig, load_config
from nextgpu_node.errors import ConfigError, DaemonUnreachable
from nextgpu_node.hostinfo.checks import Check, check_host, check_remains
from nextgpu_node.sandbox.policy import STRONGEST, TIERS, Tier
from nextgpu_node.sandbox.probe import SandboxReport, probe
from nextgpu_node.sdk.api_client import ApiClient

_PROBLEM: Final = 1
_MARKS: Final = {True: "ok", False: "FAIL", None: "--"}


async def doctor(*, ctx: Ctx) -> int:
    """Check this machine.  Ends with 1 where something essential fails."""
    config_check, sharing = _check_config(ctx)
    checks = [
        config_check,
        *check_host(ctx.paths),
        *_check_sandbox(probe(), sharing),
        *check_remains(),
        *await _check_daemon(ctx),
    ]
    if ctx.out.json:
        ctx.out.print_json(
            ok=all(check.ok is not False for check in checks),
            checks=[dataclasses.asdict(check) for check in checks],
        )
    else:
        _print(ctx, checks)
    return _PROBLEM if any(check.ok is False for check in checks) else 0


def _print(ctx: Context, checks: list[Check]) -> None:
    name_width = max(len(check.name) for check in checks)
    for check in checks:
        ctx.out.say(f"{_MARKS[check.ok]:4}  {check.name.ljust(name_width)}  {check.detail}")
        if check.remedy:
            ctx.out.say(" " * (name_width + 8) + "-> " + check.remedy)


def _check_config(ctx: Context) -> tuple[Check, SharingConfig]:
    try:
        config = load_config(ctx.paths, overrides={}, environ=ctx.environ)
    except ConfigError as exc:
        fault = Check("settings", False, str(exc), "Correct that line of the file.")
        return fault, SharingConfig()
    return Check("settings", True, "valid"), config.sharing


def _check_sandbox(report: SandboxReport, sharing: SharingConfig) -> list[Check]:
    """A missing layer is a failure only where this machine is meant to lend."""
    not_lending = False if sharing.enabled else None
    tier, floor = report.tier, sharing.minimum_isolation
    if tier == "none":
        said = "not possible here: this node can borrow, not lend"
        headline = Check("sandbox", not_lending, said)
    elif TIERS.index(tier) > TIERS.index(floor):
        said = f"tier {tier}, and sharing.minimum_isolation is {floor}: this node does not lend"
        headline = Check("sandbox", not_lending, said, "Bring what is named below.")
    else:
        headline = Check("sandbox", True, f"tier {tier}: {', '.join(report.layers)}")
    missing = [Check("sandbox", None, f"{layer} is missing", fix) for layer, fix in report.missing]
    return [headline, *_check_floor(floor), *missing]


def _check_floor(floor: Tier) -> list[Check]:
    """The owner may lower it; it is said whenever anybody looks."""
    if floor == STRONGEST:
        return []
    said = f"sharing.minimum_isolation is {floor}: this node lends behind weaker walls too"
    return [Check("sandbox", None, said, "nextgpu config set sharing.minimum_isolation A")]


async def _check_daemon(ctx: Context) -> list[Check]:
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            status = await api.status()
    except DaemonUnreachable:
        return [Check("daemon", None, "not running", "Start it: nextgpu up")]
    return [
        Check("daemon", True, f"running, version {status.version}"),
        _check_peers(status),
        _check_sharing(status),
    ]


def _check_peers(status: StatusReply) -> Check:
    if status.connected_peers:
        return Check("network", True, f"connected to {status.connected_peers} peers")
    return Check(
        "network",
        None,
        "connected to nobody",
        "Name a node of the network: nextgpu config set network.bootstrap /ip4/…/tcp/…/p2p/…",
    )


def _check_sharing(status: StatusReply) -> Check:
    sharing = status.sharing
    if sharing.active:
        return Check("sharing", True, f"on, {sharing.free_slots} of {sharing.slots} slots free")
    if sharing.cause == "sandbox":
        return Check("sharing", False, f"paused: {sharing.reason}", "See the lines above.")
    if sharing.enabled:
        # The owner's own rules: nothing is wrong.
        return Check("sharing", True, describe(sharing))
    return Check("sharing", None, "off", "Lend this device: nextgpu share on")
