"""The lending side of a node: on, off, and everything that runs only while it is on.

While it is off there is no launcher, no worker and no torch in memory.  What is refused, and
why, is `core`'s to decide; what is known of the host comes from `hostinfo` and `sandbox`.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import structlog
import trio

from nextgpu_node.api_types import SharingView, UnitView
from nextgpu_node.clock import now_ms
from nextgpu_node.config import SharingConfig
from nextgpu_node.core.admission import OwnerPolicy
from nextgpu_node.core.lending import Lending
from nextgpu_node.daemon.devices import HostDevices, as_message
from nextgpu_node.daemon.lending import LentUnit
from nextgpu_node.daemon.successions import FormerKeys
from nextgpu_node.daemon.tokens import Tokens
from nextgpu_node.daemon.workers import WorkerPool
from nextgpu_node.errors import SandboxError
from nextgpu_node.frames import FrameStream
from nextgpu_node.hostinfo.devices import Device, default_threads
from nextgpu_node.identity import Identity
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_node.sandbox.launcher import Launcher, Worker
from nextgpu_node.sandbox.policy import STRONGEST, TIERS, WorkerPolicy
from nextgpu_node.sandbox.probe import SandboxReport, probe
from nextgpu_node.sandbox.service_launcher import launcher_for
from nextgpu_protocol.capability import keys_for_capacity
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import PeerId, PeerKey
from nextgpu_protocol.messages import SUITE, Capacity, Refusal, UnitRequest, UnitResume
from nextgpu_protocol.program_limits import TABLE_VERSION

log = structlog.get_logger()

_CAPACITY_LIFETIME_MS = 60_000
_RESTART_S = 30
_WARM_WORKER_S = 24 * 3600.0
_PYTHON_WORKER = "nextgpu_node.worker.python"
_PYTHON_START_S = 30
_RESUME_DEADLINE_S = 10
_OFF = "sharing is off"
_STARTING = "starting"


class Provider:
    """Lends one device of this host.  `run` it once; it follows `set_enabled`."""

    def __init__(
        self,
        config: SharingConfig,
        identity: Identity,
        devices: HostDevices,
        worker_dir: Path,
        tokens: Tokens,
        former_keys: FormerKeys,
    ) -> None:
        self._config = config
        self._devices = devices
        self._identity = identity
        self._worker_dir = worker_dir
        self._tokens = tokens
        self._former_keys = former_keys
        self._enabled = config.enabled
        self._reason = _STARTING if config.enabled else _OFF
        self._switched = trio.Event()
        self._pool: WorkerPool | None = None
        self._python_ready = trio.Event()
        self._python_launcher: Launcher | None = None
        self._python_policy: WorkerPolicy | None = None
        self._session_ids = itertools.count(1)
        self._units: dict[int, LentUnit] = {}
        self.sandbox = SandboxReport(tier="none", layers=(), missing=())
        self._decider = Lending(
            PeerKey(identity.public_key),
            self._policy(),
            table_version=TABLE_VERSION,
            tokens=tokens.book,
            own_former_keys=frozenset(identity.former_keys),
        )

    # --- on and off -------------------------------------------------------------------------

    def set_enabled(self, enabled: bool) -> None:
        """The owner's switch.  Off ends every lent unit at once."""
        if enabled == self._enabled:
            return
        self._enabled = enabled
        self._reason = _STARTING if enabled else _OFF
        self._update_policy()
        self._switched.set()

    async def run(self) -> None:
        """Lend while enabled, until cancelled."""
        while True:
            self._switched = trio.Event()
            if not self._enabled:
                await self._switched.wait()
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lend)
                await self._switched.wait()
                await self.stop_units("owner_stopped", ErrorCode.NOT_SHARING)
                nursery.cancel_scope.cancel()

    async def stop_units(self, status: str, code: ErrorCode, *, grace_s: float = 3) -> None:
        """End every lent unit, each with its wipe and its receipt, within `grace_s`."""
        for unit in list(self._units.values()):
            unit.stop(status, code)
        with trio.move_on_after(grace_s):
            for unit in list(self._units.values()):
                await unit.finished.wait()

    async def _lend(self) -> None:
        """Launcher and warm workers; started again where the sandbox fails for a while."""
        while True:
            try:
                await self._lend_once()
            except* SandboxError as group:
                self._pause(str(group.exceptions[0]))
            await trio.sleep(_RESTART_S)

    async def _lend_once(self) -> None:
        self.sandbox = await trio.to_thread.run_sync(probe)
        tier = self.sandbox.tier
        if self._config.minimum_isolation != STRONGEST:
            log.warning("sharing.isolation_floor_lowered", floor=self._config.minimum_isolation)
        if tier == "none" or TIERS.index(tier) > TIERS.index(self._config.minimum_isolation):
            missing = ", ".join(layer for layer, _ in self.sandbox.missing) or "unknown"
            self._pause(f"the sandbox lacks layers: {missing}; see `nextgpu doctor`")
            return
        device = self._devices.chosen(self._config.device)
        if device is None:
            self._pause(f"there is no device {self._config.device!r}")
            return
        launcher = launcher_for(tier, self._worker_dir)
        async with trio.open_nursery() as nursery:
            await nursery.start(launcher.run)
            self._pool = WorkerPool(
                launcher, self._worker_policy(device), self._config.warm_workers
            )
            try:
                await self._pool.fill()
                nursery.start_soon(self._pool.run)
                if self._python_allow:
                    nursery.start_soon(self._launch_python, self._worker_policy(device))
                self._reason = ""
                self._update_policy()
                log.info("sharing.started", tier=tier)
                await trio.sleep_forever()
            finally:
                self._pool = None
                self._reason = self._reason or _STARTING
                self._update_policy()

    @property
    def _python_allow(self) -> tuple[str, ...]:
        """Code needs the whole sandbox, whatever the owner accepts for programs."""
        return self._config.python_allow if self.sandbox.tier == "A" else ()

    async def _launch_python(self, policy: WorkerPolicy) -> None:
        """A launcher of its own, so that the one for programs never has an unpickler in memory."""
        launcher = Launcher(
            runtime_dir=self._worker_dir / "python", worker_module=_PYTHON_WORKER, tier="A"
        )
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(launcher.run)
                self._python_launcher, self._python_policy = launcher, policy
                self._python_ready.set()
                await trio.sleep_forever()
        except* SandboxError as group:
            # Programs are lent all the same.
            log.error("sharing.python_failed", reason=str(group.exceptions[0]))
        finally:
            self._python_launcher, self._python_ready = None, trio.Event()

    def _pause(self, reason: str) -> None:
        log.warning("sharing.paused", reason=reason)
        self._reason = reason
        self._update_policy()

    # --- what we are ------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Lending at this moment: switched on, and everything that it takes is there."""
        return self._enabled and self._pool is not None and not self._reason

    @property
    def _free_slots(self) -> int:
        used = self._decider.used_slots
        return max(0, self._config.max_concurrent_units - used) if self.is_active else 0

    def _policy(self) -> OwnerPolicy:
        config = self._config
        device = self._devices.chosen(config.device)
        return OwnerPolicy(
            sharing=self.is_active,
            reason=self._reason,
            device=as_message(device) if device else None,
            max_concurrent_units=config.max_concurrent_units,
            memory_bytes=config.max_memory_bytes,
            max_seconds=config.max_unit_seconds,
            input_bytes=config.max_input_bytes,
            output_bytes=config.max_output_bytes,
            requests_per_minute=config.requests_per_minute,
            allow=frozenset(PeerId(peer) for peer in config.allow),
            deny=frozenset(PeerId(peer) for peer in config.deny),
            serve=config.serve,
            python_allow=frozenset(PeerId(peer) for peer in self._python_allow),
        )

    def _update_policy(self) -> None:
        self._decider.policy = self._policy()

    def _worker_policy(self, device: Device) -> WorkerPolicy:
        config = self._config
        return WorkerPolicy(
            memory_bytes=config.max_memory_bytes,
            max_threads=config.threads or default_threads(),
            cpu_s=config.max_unit_seconds * (config.threads or default_threads()) + 60,
            # The unit's own clock starts with its header (restart_clock); until then a warm
            # worker waits, and after a day a fresh one takes its place.
            wall_s=_WARM_WORKER_S,
            device=device.label,
            device_node=device.minor,
        )

    def capability_keys(self) -> list[bytes]:
        """Where the DHT should find this node; nowhere while it does not lend."""
        device = self._decider.policy.device
        if not self.is_active or device is None:
            return []
        return keys_for_capacity(device.kind, device.memory_total_bytes)

    def capacity_record(self) -> bytes:
        """The signed capacity of this moment."""
        self._update_policy()
        policy, issued_at_ms = self._decider.policy, now_ms()
        capacity = Capacity(
            suites=(SUITE,),
            devices=(policy.device,) if policy.device else (),
            free_slots=self._free_slots,
            memory_bytes=policy.memory_bytes,
            max_seconds=policy.max_seconds,
            input_bytes=policy.input_bytes,
            output_bytes=policy.output_bytes,
            runtime=self.runtime,
            table_version=TABLE_VERSION,
            isolation=self.sandbox.layers,
            sharing=policy.sharing,
            reason=policy.reason[:200],
            issued_at_ms=issued_at_ms,
            expires_at_ms=issued_at_ms + _CAPACITY_LIFETIME_MS,
        )
        return sign_message(capacity, self._identity.signing_key).data

    @property
    def runtime(self) -> str:
        return self._pool.runtime if self._pool else ""

    def sharing_view(self) -> SharingView:
        return SharingView(
            enabled=self._enabled,
            active=self.is_active,
            reason=self._reason,
            slots=self._config.max_concurrent_units,
            free_slots=self._free_slots,
        )

    def unit_views(self) -> list[UnitView]:
        now_s = time.monotonic()
        views = []
        for unit in self._units.values():
            input_bytes, output_bytes = unit.sizes
            view = UnitView(
                unit_id=unit.unit_id,
                role="lending",
                state=unit.state,
                age_s=round(now_s - unit.began_s, 3),
                input_bytes=input_bytes,
                output_bytes=output_bytes,
            )
            views.append(view)
        return views

    # --- units ------------------------------------------------------------------------------

    async def serve(self, stream: PeerStream) -> None:
        """One unit stream of one peer, to its end."""

        async def former_keys(request: Signed[UnitRequest]) -> frozenset[PeerKey]:
            return await self._former_keys.of(request, stream.peer_id, self._decider.policy)

        unit = LentUnit(
            next(self._session_ids),
            stream,
            PeerId(stream.peer_id),
            self._decider,
            self._take_worker,
            self.runtime,
            self._identity,
            self._tokens.ledger,
            former_keys,
            self._take_python_worker,
        )
        self._units[unit.id] = unit
        try:
            await unit.run()
        finally:
            del self._units[unit.id]
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await stream.aclose()

    async def resume(self, stream: PeerStream) -> None:
        """A stream on which a submitter comes back to its unit, for as long as it carries that."""
        frames = FrameStream(stream)
        with trio.fail_after(_RESUME_DEADLINE_S):
            body = await frames.expect_untrusted(FrameKind.RESUME)
        try:
            resume = open_envelope_untrusted(UnitResume, body)
            unit = self._unit_untrusted(resume.message.unit_id)
            link = await unit.resume_untrusted(resume, stream, PeerId(stream.peer_id))
        except RemoteProtocolError as exc:
            with trio.move_on_after(_RESUME_DEADLINE_S):
                refusal = encode_message(Refusal(int(exc.code), exc.detail[:200]))
                await frames.send(FrameKind.REFUSAL, refusal)
            return
        await link.over.wait()

    def _unit_untrusted(self, unit_id: bytes) -> LentUnit:
        for unit in self._units.values():
            if unit.unit_id == unit_id.hex():
                return unit
        raise RemoteProtocolError(ErrorCode.UNKNOWN_UNIT)

    async def _take_worker(self, memory_bytes: int) -> Worker:
        if self._pool is None:
            raise SandboxError("sharing was switched off")
        return await self._pool.take(memory_bytes)

    async def _take_python_worker(self, memory_bytes: int) -> tuple[Worker, str]:
        """Never a warm one: forked for this submitter, from the launcher of its kind."""
        with trio.move_on_after(_PYTHON_START_S):
            await self._python_ready.wait()
        launcher, policy = self._python_launcher, self._python_policy
        if launcher is None or policy is None:
            raise SandboxError("the launcher of Python units does not run")
        worker = await launcher.spawn(replace(policy, memory_bytes=memory_bytes))
        return worker, launcher.runtime

    def end_units_under(self, token_id: bytes) -> None:
        """The token was revoked: what runs under it ends, with its receipt."""
        for session in self._decider.sessions_under(token_id):
            if session in self._units:
                self._units[session].stop("owner_stopped", ErrorCode.TOKEN_REVOKED)

    def cancel(self, unit_id: str) -> bool:
        """End the lent unit of that id; False where there is none."""
        for unit in self._units.values():
            if unit_id and unit.unit_id == unit_id:
                unit.stop("owner_stopped", ErrorCode.CANCELLED)
                return True
        return False
