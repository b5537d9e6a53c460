"""What the person who waits for a map sees.

a terminal     a bar, the rate of each peer, and when it will be done
elsewhere      a line every ten seconds
--json         every event of the job as one line, and a summary as the last
"""

from __future__ import annotations

import time
from collections import Counter, deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nextgpu_node.cli.output import Output, human_seconds, printable
from nextgpu_node.core.forecast import WINDOW, eta_s, shards_per_s
from nextgpu_node.core.job_state import (
    JobEvent,
    PeerDistrusted,
    PeerFailed,
    ShardEntered,
    ShardKept,
)
from nextgpu_node.sdk.jobs import Job

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_LINE_EVERY_S: Final = 10.0
_SHOWN_PEERS: Final = 8
_SHOWN_FAILURES: Final = 10
_BAR: Final = 30


def counted(count: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class MapProgress:
    """Follows one job by its events alone, so it can begin anywhere."""

    def __init__(self, out: Output, job: Job, *, quiet: bool) -> None:
        self._out = out
        self._job = job
        self._quiet = quiet
        self._live: Live | None = None
        self._shown_s = time.monotonic()
        self._began_s = time.monotonic()
        self._done_s: deque[float] = deque(maxlen=WINDOW)
        self._peer_done: Counter[str] = Counter()
        self._state = job.state()
        self._lost = 0
        self.has_begun = bool(self._state.indexes("done"))

    def __enter__(self) -> MapProgress:
        import sys

        if not self._quiet and not self._out.json and sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(
                console=self._out.console(stderr=True),
                get_renderable=self._table,
                refresh_per_second=5,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def take(self, event: JobEvent) -> None:
        """One event of the job."""
        self._state.apply(event)
        match event:
            case ShardEntered(status=status):
                self.has_begun |= status != "queued"
            case ShardKept(peer_id=peer_id):
                self._done_s.append(time.monotonic())
                self._peer_done[peer_id] += 1
            case PeerFailed():
                self._lost += 1
            case PeerDistrusted(peer_id=peer_id, why=why):
                self._note(f"{peer_id} is asked no more: {why}.")
            case _:
                pass
        if self._out.json:
            self._out.print_json(**msgspec.to_builtins(event))
        self._maybe_show_line()

    def report(self, skipped: int = 0) -> None:
        """The summary, once the job is done."""
        view, seconds = self._job.view(), time.monotonic() - self._began_s
        if self._out.json:
            self._out.print_json(
                **msgspec.to_builtins(view),
                skipped=skipped,
                peers=dict(self._peer_done),
                distrusted=self._state.distrusted,
                attempts_lost=self._lost,
                seconds=round(seconds, 3),
            )
            return
        before = f", {skipped} were there already" if skipped else ""
        self._out.say(
            f"Done: {counted(view.done, 'shard')} over {counted(len(self._peer_done), 'peer')} "
            f"in {human_seconds(seconds)}{before}.",
            *(f"  {peer}  {count}" for peer, count in self._peer_done.most_common()),
        )

    def list_failures(self) -> None:
        """The shards that were given up, each with its reason."""
        failed = self._state.indexes("failed")
        if self._out.json:
            for shard in failed:
                self._out.print_json(
                    failed=self._job.manifest.shards[shard].name,
                    why=self._state.shards[shard].why,
                )
            return
        names = self._job.manifest.shards
        self._out.note(
            *(
                f"failed: {names[k].name}: {self._state.shards[k].why}"
                for k in failed[:_SHOWN_FAILURES]
            )
        )
        if len(failed) > _SHOWN_FAILURES:
            self._out.note(f"… and {len(failed) - _SHOWN_FAILURES} more.")

    def _note(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(printable(text))
        elif not self._quiet and not self._out.json:
            self._out.note(text)

    def _maybe_show_line(self) -> None:
        now_s = time.monotonic()
        if self._live is not None or self._quiet or self._out.json:
            return
        if now_s - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = now_s
            self._out.note(self._line())

    def _line(self) -> str:
        counts = self._state.counts()
        total = len(self._state.shards)
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        return f"{self._state.status}: {counts['done']} of {total}{failed}, {self._forecast()}"

    def _forecast(self) -> str:
        """Said only where enough was seen to say it."""
        now_s = time.monotonic()
        counts = self._state.counts()
        remaining = len(self._state.shards) - counts["done"] - counts["failed"]
        times_s = list(self._done_s)
        rate, left_s = shards_per_s(times_s, now_s), eta_s(times_s, remaining, now_s)
        if rate is None or left_s is None:
            return "too early to say how long"
        return f"{rate:.1f}/s, about {human_seconds(left_s)} left"

    def _table(self) -> Table:
        """Drawn several times a second, by rich's own thread."""
        from rich.table import Table
        from rich.text import Text

        counts = self._state.counts()
        total = max(1, len(self._state.shards))
        filled = round(_BAR * counts["done"] / total)
        table: Any = Table.grid(padding=(0, 2))
        table.add_row(Text("█" * filled + "░" * (_BAR - filled) + f"  {self._line()}"))
        elapsed_s = max(1e-9, time.monotonic() - self._began_s)
        for peer, count in self._peer_done.most_common(_SHOWN_PEERS):
            table.add_row(Text(printable(f"{peer}  {count}  {count / elapsed_s:.1f}/s")))
        return table  # type: ignore[no-any-return]
