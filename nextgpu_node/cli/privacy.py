"""`nextgpu privacy audit`: a marked job through real daemons; then a search of everything left.

    two daemons on loopback, in a home of their own     one unit for each way to end
    search                                              a table: searched, found, not searched

The process of the audit is the submitter's own and has the text: it is the one that is not
searched.  That the search finds what is there is tried first, on a process that keeps a mark.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from nextgpu_node.api_types import PeerNeed
from nextgpu_node.cli.audited_units import AuditedNodes, AuditedUnits, Exit, make_program
from nextgpu_node.cli.context import Ctx
from nextgpu_node.cli.output import human_bytes
from nextgpu_node.cli.processes import DaemonProcess
from nextgpu_node.errors import NextGPUError
from nextgpu_node.hostinfo.devices import list_devices
from nextgpu_node.privacy import machine, places
from nextgpu_node.privacy.marks import Marks
from nextgpu_node.privacy.places import Look
from nextgpu_node.sandbox.probe import probe
from nextgpu_node.sdk.api_client import ApiClient

#: The exit code where a mark was found: what must not be there was there.
FOUND: Final = 7
_INCOMPLETE: Final = 1
# A launcher imports torch first, on whatever else this machine does.
_READY_S: Final = 240
_SHARED_TEMPORARY: Final = ("/tmp", "/var/tmp")  # noqa: S108  searched, never written
_SETTINGS: Final = {
    "sharing.enabled": "true",
    "sharing.minimum_isolation": "C",
    "sharing.max_memory": "1 GiB",
    "sharing.requests_per_minute": "1000",
    "log.level": "debug",
}
# Keeps a mark in every kind of place until its stdin is closed.
_CONTROL: Final = """
import os, sys, tempfile
mark = sys.stdin.buffer.readline().strip()
kept = bytearray(mark * 2)
unnamed = tempfile.TemporaryFile(); unnamed.write(kept.hex().encode()); unnamed.flush()
memory = os.memfd_create("control"); os.write(memory, kept)
print(len(kept), flush=True)
sys.stdin.buffer.read()
"""

FREED: Final = Look(
    "freed memory",
    unsearched="no program can read it; the kernel clears a page before another process gets it",
)


@dataclass(slots=True)
class Report:
    """What the audit learnt."""

    looks: dict[str, Look] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    control: bool = False
    tier: str = ""
    seconds: float = 0.0

    def add(self, look: Look) -> None:
        self.looks[look.place] = self.looks.get(look.place, Look(look.place)) + look

    @property
    def found(self) -> int:
        return sum(look.found.count for look in self.looks.values())

    @property
    def complete(self) -> bool:
        """Whether every unit ended as it was to, and the search is able to find."""
        return self.control and all(one.held for one in self.exits)

    @property
    def exit_code(self) -> int:
        if self.found:
            return FOUND
        return 0 if self.complete else _INCOMPLETE


async def audit(*, ctx: Ctx) -> int:
    """Send a marked job through the real path and search what the node leaves of it.

    Two daemons of its own run on loopback; the node that may run here is not touched.  Ends with 7
    where a mark was found, with 1 where the audit could not be done in full.
    """
    note = (lambda *_: None) if ctx.out.json else ctx.out.note
    report = await run_audit(note)
    if ctx.out.json:
        ctx.out.print_json(**as_json(report))
    else:
        _print(ctx, report)
    return report.exit_code


def as_json(report: Report) -> dict[str, Any]:
    """The report as `--json` prints it."""
    return {
        "ok": report.exit_code == 0,
        "found": report.found,
        "control_found": report.control,
        "isolation_tier": report.tier,
        "exits": [
            {"unit": one.unit, "wanted": one.wanted, "ended": one.ended} for one in report.exits
        ],
        "places": [
            {
                "place": look.place,
                "searched_bytes": look.searched_bytes,
                "items": look.items,
                "found": look.found.count,
                "units": sorted(look.found.units),
                "not_searched": look.unsearched,
            }
            for look in report.looks.values()
        ],
        "seconds": report.seconds,
    }


def _print(ctx: Ctx, report: Report) -> None:
    ctx.out.table(
        ("UNIT", "WAS TO END", "ENDED"), [(e.unit, e.wanted, e.ended) for e in report.exits]
    )
    ctx.out.say("")
    ctx.out.table(
        ("PLACE", "SEARCHED", "ITEMS", "FOUND", "NOT SEARCHED"),
        [
            (
                look.place,
                _searched(look),
                str(look.items or "-"),
                _found(look),
                look.unsearched or "-",
            )
            for look in report.looks.values()
        ],
    )
    ctx.out.say("")
    if report.found:
        ctx.out.say(f"FOUND {report.found} MARKS. Plaintext of a work unit was left behind.")
        ctx.out.say("This is a defect: please report it, with `nextgpu bugreport`.")
    elif not report.complete:
        ctx.out.say("Nothing was found, but the audit was not complete: see above.")
    else:
        ctx.out.say(f"Nothing was found, in {report.seconds:.0f} s (sandbox tier {report.tier}).")
    ctx.out.say(
        "The process of this command is the submitter's own, has the text, and is not searched."
    )


def _searched(look: Look) -> str:
    if look.items or look.searched_bytes:
        return human_bytes(look.searched_bytes)
    return "-" if look.unsearched else "nothing is there"


def _found(look: Look) -> str:
    units = ", ".join(sorted(look.found.units))
    return f"{look.found.count} ({units})" if look.found.count else "0"


async def run_audit(
    note: Callable[..., None],
    *,
    provider_module: str = "nextgpu_node.daemon.main",
    before_search: Callable[[AuditedNodes, Marks], None] | None = None,
    only_success: bool = False,
) -> Report:
    """The whole audit.  Raises NextGPUError where it can not be done at all.

    The last three are for tests that leak on purpose.
    """
    began_s, report = time.time(), Report()
    report.tier = probe().tier
    if report.tier == "none":
        raise NextGPUError("This machine can not lend (see `nextgpu doctor`): nothing to audit.")
    marks = Marks()
    work = Path(tempfile.mkdtemp(prefix="nextgpu-audit-"))
    try:
        note("Starting two daemons on loopback …")
        report.control = await trio.to_thread.run_sync(_control_is_found, marks)
        with _daemons(work, provider_module) as nodes:
            program = await trio.to_thread.run_sync(make_program)
            units = AuditedUnits(nodes, marks, program)
            search = _Search(report, marks, units, work, began_s)
            await _end_well(report, search, note)
            if not only_success:
                await _end_badly(report, search)
            if before_search is not None:
                before_search(nodes, marks)
            note("Searching memory, descriptors and shared memory …")
            await trio.to_thread.run_sync(search.running)
            if not only_success:
                await _kill_and_restart(report, search, note)
        note("Searching what is left on the disk …")
        await trio.to_thread.run_sync(search.disk)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report.seconds = round(time.time() - began_s, 1)
    return report


async def _end_well(report: Report, search: _Search, note: Callable[..., None]) -> None:
    await _wait_lending(search.nodes)
    note("Running units that end well, badly, late, early and by force …")
    report.exits.append(await search.units.success(search.during))
    await _wait_lending(search.nodes)
    await trio.to_thread.run_sync(search.waiting_workers)


async def _end_badly(report: Report, search: _Search) -> None:
    units = search.units
    for unit in (units.error, units.timeout, units.cancel, units.worker_killed):
        report.exits.append(await unit())
        await _wait_lending(search.nodes)


async def _kill_and_restart(report: Report, search: _Search, note: Callable[..., None]) -> None:
    note("Killing the provider's daemon in the middle of a unit, and starting it again …")
    report.exits.append(await search.units.daemon_killed())
    await trio.to_thread.run_sync(search.left_by_a_kill)
    await trio.to_thread.run_sync(search.nodes.provider.start)
    await _wait_lending(search.nodes)
    report.exits.append(await search.units.restart())
    await _wait_lending(search.nodes)
    await trio.to_thread.run_sync(search.running)


@contextmanager
def _daemons(work: Path, provider_module: str) -> Iterator[AuditedNodes]:
    """Whatever they or their libraries write to a home or a temporary directory is below `work`."""
    for name in ("home", "tmp"):
        (work / name).mkdir(mode=0o700)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "NEXTGPU_"))}
    environ = inherited | {"HOME": str(work / "home"), "TMPDIR": str(work / "tmp")}
    with ExitStack() as stack:
        log = stack.enter_context((work / "log").open("wb"))
        # A port that outlives a restart: the submitter looks for the provider where it was.
        settings = _SETTINGS | {"network.listen": f'["/ip4/127.0.0.1/tcp/{_free_port()}"]'}
        provider = DaemonProcess(
            work / "lend", settings=settings, log=log, module=provider_module, environ=environ
        )
        stack.enter_context(provider)
        bootstrap = [provider.wait_ready().address]
        submitter = DaemonProcess(
            work / "borrow",
            bootstrap=bootstrap,
            settings={"log.level": "debug"},
            log=log,
            environ=environ,
        )
        stack.enter_context(submitter)
        submitter.wait_ready()
        yield AuditedNodes(provider, submitter)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def _wait_lending(nodes: AuditedNodes) -> None:
    """Until the provider lends, is idle, and the submitter finds it."""
    deadline_s = trio.current_time() + _READY_S
    async with (
        ApiClient(nodes.provider.paths.api_socket) as lends,
        ApiClient(nodes.submitter.paths.api_socket) as borrows,
    ):
        while True:
            idle = not (await lends.units()).units
            if idle and (await lends.status()).sharing.free_slots:
                found = (await borrows.peers(PeerNeed())).peers
                if any(peer.free_slots for peer in found):
                    return
            if trio.current_time() > deadline_s:
                raise NextGPUError(f"The audit's provider did not lend within {_READY_S} s.")
            await trio.sleep(0.1)


def _control_is_found(marks: Marks) -> bool:
    """Whether the search finds a mark in memory, in a file without a name and in a memfd."""
    control = Marks()
    mark = control.plant("control")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _CONTROL], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(mark + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        memory = places.search_memory("", process.pid, control)
        descriptors = places.search_descriptors("", process.pid, control)
        absent = places.search_memory("", process.pid, marks)
        process.stdin.close()
    return memory.found.count >= 2 and descriptors.found.count >= 4 and not absent.found.count


class _Search:
    """Where the audit looks, and when."""

    def __init__(
        self, report: Report, marks: Marks, units: AuditedUnits, work: Path, began_s: float
    ) -> None:
        self.marks = marks
        self.units = units
        self.nodes = units.nodes
        self._report = report
        self._work = work
        self._began_s = began_s

    def during(self) -> None:
        """While a worker has the text, nobody else may."""
        self._daemons("while a unit runs")

    def waiting_workers(self) -> None:
        """Forked before the units came; a worker that has served one is gone."""
        self._memory("memory of waiting workers", self.nodes.workers())

    def running(self) -> None:
        """Between units: every process of the nodes, and what they share or hold open."""
        self._daemons("between units")
        self.waiting_workers()
        everyone = [*self.nodes.daemons.values(), *self.nodes.launchers(), *self.nodes.workers()]
        for pid in everyone:
            self._add(places.search_descriptors("open and unlinked files", pid, self.marks))
        self._shared()
        self._add(machine.look_at_swap("swap", everyone))

    def left_by_a_kill(self) -> None:
        """The killed daemon's home, and whoever outlived it."""
        self._files()
        self._shared()
        self._daemons("between units")

    def disk(self) -> None:
        """After the end of every process."""
        self._files()
        since_s, marks = self._began_s, self.marks
        shared = [Path(name) for name in _SHARED_TEMPORARY]
        self._add(
            places.search_files(
                "shared temporary files", shared, marks, since_s=since_s, without=self._work
            )
        )
        self._add(machine.search_journal("journal", marks, since_s=since_s))
        cores = [Path.cwd()] if (Path.cwd() / "core").exists() else []
        self._add(machine.search_core_dumps("core dumps", marks, cores, since_s=since_s))
        cards = sum(device.kind == "cuda" for device in list_devices())
        self._add(machine.search_gpu_memory("GPU memory", marks, cards=cards))
        self._add(FREED)

    def _daemons(self, when: str) -> None:
        self._memory(f"memory of daemons {when}", list(self.nodes.daemons.values()))
        self._memory(f"memory of launchers {when}", self.nodes.launchers())

    def _memory(self, place: str, pids: list[int]) -> None:
        for pid in pids:
            self._add(places.search_memory(place, pid, self.marks))

    def _files(self) -> None:
        for name, place in (
            ("lend", "files of the provider"),
            ("borrow", "files of the submitter"),
            ("home", "files in the home directory"),
            ("tmp", "temporary files"),
            ("log", "logs, at level debug"),
        ):
            self._add(places.search_files(place, [self._work / name], self.marks))

    def _shared(self) -> None:
        self._add(places.search_shared_memory("shared memory", self.marks, since_s=self._began_s))

    def _add(self, look: Look) -> None:
        self._report.add(look)
