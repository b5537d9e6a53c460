"""`nextgpu bugreport`: facts that help to find a defect, shown before they are saved.

No content, ids, names, paths or addresses: only versions, kinds, counts, and settings that are
switches, numbers or words from a fixed list.  What is a text or a list of one's own is told as
"set" or "not set".
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter

from nextgpu_node import config as settings
from nextgpu_node import data
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.output import SCHEMA
from nextgpu_node.config import Choice, Size, Switch, Whole
from nextgpu_node.errors import ConfigError, DaemonUnreachable, UsageError
from nextgpu_node.files import check_writable, write_whole
from nextgpu_node.hostinfo.checks import check_host, check_remains
from nextgpu_node.hostinfo.devices import list_devices
from nextgpu_node.sandbox.probe import probe
from nextgpu_node.sdk.api_client import ApiClient

_PACKAGES: Final = (
    *("anycorn", "cyclopts", "httpx", "libp2p", "msgpack", "msgspec", "numpy", "nvidia-ml-py"),
    *("psutil", "PyNaCl", "safetensors", "starlette", "structlog", "torch", "trio"),
)
_TELLING: Final = (Switch, Whole, Size, Choice)


async def bugreport(
    *,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="Where to save it.")
    ] = None,
    yes: Annotated[bool, Parameter(negative="", help="Save it without being asked.")] = False,
    force: Annotated[bool, Parameter(negative="", help="Replace an existing file.")] = False,
    ctx: Ctx,
) -> int:
    """What helps to find a defect: versions, kinds, counts; nothing that is yours.

    It is shown in full first.  Nothing is sent anywhere.
    """
    destination = output or Path("nextgpu-bugreport.json")
    if output is not None:
        check_writable(destination, force=force)
    report = await collect(ctx)
    text = json.dumps({"schema": SCHEMA, **report}, indent=2)
    if ctx.out.json:
        ctx.out.print_json(**report)
    else:
        print(text)
    if not (yes or _agreed(destination)):
        return 0
    check_writable(destination, force=force)
    write_whole(destination, [text.encode(), b"\n"], force=force)
    ctx.out.note(f"Saved to {destination}.")
    return 0


def _agreed(destination: Path) -> bool:
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"Save this to {destination}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


async def collect(ctx: Context) -> dict[str, Any]:
    """The report."""
    sandbox = probe()
    return {
        "version": metadata.version("nextgpu-node"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "distribution": _distribution(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "root": os.geteuid() == 0,
        },
        "devices": [
            {
                "kind": device.kind,
                "memory_total_bytes": device.total_memory_bytes,
                "compute_capability": device.compute_capability,
                "driver": device.driver,
            }
            for device in list_devices()
        ],
        "sandbox": {
            "tier": sandbox.tier,
            "layers": list(sandbox.layers),
            "missing": [layer for layer, _ in sandbox.missing],
        },
        "checks": {c.name: c.ok for c in (*check_host(ctx.paths), *check_remains())},
        "settings": _settings(ctx),
        "data": {
            one.kind.name: {"files": one.files, "size_bytes": one.size_bytes}
            for one in data.survey(ctx.paths)
        },
        "daemon": await _daemon(ctx),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _distribution() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    return f"{release.get('ID', '')} {release.get('VERSION_ID', '')}".strip()


def _settings(ctx: Context) -> dict[str, Any] | str:
    """Those that differ from their defaults."""
    try:
        loaded = settings.load_config(ctx.paths, overrides={}, environ=ctx.environ)
    except ConfigError:
        # Its sentence quotes what is wrong.
        return "not valid"
    return {
        key: _told(key, value)
        for key, value in loaded.items()
        if value != settings.SETTINGS[key].default
    }


def _told(key: str, value: object) -> object:
    if isinstance(settings.SETTINGS[key].rule, _TELLING):
        return value
    return "set" if value else "not set"


async def _daemon(ctx: Context) -> dict[str, Any] | None:
    """None where no node runs.  Reasons are left out: they may name a program of the owner's."""
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            status, log = await api.status(), await api.log()
            units = (await api.units()).units
    except DaemonUnreachable:
        return None
    except UsageError:
        return {"version": "another"}
    return {
        "version": status.version,
        "uptime_s": status.uptime_s,
        "connected_peers": status.connected_peers,
        "sharing": {
            "enabled": status.sharing.enabled,
            "active": status.sharing.active,
            "state": status.sharing.state,
            "cause": status.sharing.cause,
            "slots": status.sharing.slots,
            "free_slots": status.sharing.free_slots,
        },
        "runtime": status.runtime,
        "isolation_tier": status.isolation_tier,
        "rss_bytes": status.rss_bytes,
        "units": {
            role: sum(unit.role == role for unit in units) for role in ("lending", "borrowing")
        },
        "log_level": log.level,
        "logged": log.events,
    }
