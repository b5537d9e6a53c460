"""The lending side of a node: on, off, and everything that runs only while it is on.

While it is off there is no launcher, no worker and no torch in memory.  What is refused, and
why, is `core`'s to decide; what is known of the host comes from `hostinfo` and `sandbox`.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import structlog
import trio

from nextgpu_node.api_types import ServedPeerView, ServingReply, SharingView, UnitView
from nextgpu_node.clock import now_ms
from nextgpu_node.config import SharingConfig, parse_part
from nextgpu_node.core.admission import OwnerPolicy
from nextgpu_node.core.lending import Lending
from nextgpu_node.core.owner import Decision
from nextgpu_node.daemon.bandwidth import Line
from nextgpu_node.daemon.devices import HostDevices, as_message
from nextgpu_node.daemon.history import History
from nextgpu_node.daemon.lanes import LaneDesk
from nextgpu_node.daemon.lending import LentUnit
from nextgpu_node.daemon.owner import OwnerWatch, Watched
from nextgpu_node.daemon.successions import FormerKeys
from nextgpu_node.daemon.tokens import Tokens
from nextgpu_node.daemon.workers import WorkerPool
from nextgpu_node.errors import SandboxError
from nextgpu_node.frames import FrameStream
from nextgpu_node.hostinfo.devices import Device, default_threads
from nextgpu_node.hostinfo.sensors import Sensors
from nextgpu_node.identity import Identity
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_node.peer_terms import parse_terms
from nextgpu_node.sandbox.launcher import Launcher, Worker
from nextgpu_node.sandbox.policy import STRONGEST, TIERS, WorkerPolicy
from nextgpu_node.sandbox.probe import SandboxReport, probe
from nextgpu_node.sandbox.service_launcher import launcher_for
from nextgpu_protocol.capability import keys_for_capacity
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import PeerId, PeerKey, public_key_from_peer_id
from nextgpu_protocol.lane import LaneEnds
from nextgpu_protocol.messages import (
    SUITE,
    Capacity,
    DeviceInfo,
    Refusal,
    UnitRequest,
    UnitResume,
)
from nextgpu_protocol.program_limits import TABLE_VERSION

log = structlog.get_logger()

_CAPACITY_LIFETIME_MS = 60_000
_RESTART_S = 30
_WARM_WORKER_S = 24 * 3600.0
_PYTHON_WORKER = "nextgpu_node.worker.python"
_PYTHON_START_S = 30
_RESUME_DEADLINE_S = 10
# For results and states on their way when the owner has the device back already.
_DELIVERY_S = 15
_SHUTDOWN_S = 5
_STARTING = "starting"


class Provider:
    """Lends one device of this host.  `run` it once; it follows its owner."""

    def __init__(
        self,
        config: SharingConfig,
        identity: Identity,
        devices: HostDevices,
        worker_dir: Path,
        tokens: Tokens,
        former_keys: FormerKeys,
        history: History,
        sensors: Sensors,
        owner_file: Path,
    ) -> None:
        self._config = config
        self._devices = devices
        self._identity = identity
        self._worker_dir = worker_dir
        self._tokens = tokens
        self._former_keys = former_keys
        self._history = history
        self._line = Line()
        self._nudged = trio.Event()
        self._device: Device | None = None
        self._trouble = ""  # why the sandbox can not be had
        self._pool: WorkerPool | None = None
        self._launcher: Launcher | None = None
        self._python_ready = trio.Event()
        self._python_launcher: Launcher | None = None
        self._python_policy: WorkerPolicy | None = None
        self._session_ids = itertools.count(1)
        self.lanes = LaneDesk()
        self._units: dict[int, LentUnit] = {}
        self.sandbox = SandboxReport(tier="none", layers=(), missing=())
        self._watch = OwnerWatch(config, sensors, owner_file, self._watched, self._nudge)
        self._device = self._pick()
        self._decider = Lending(
            PeerKey(identity.public_key),
            self._policy(),
            table_version=TABLE_VERSION,
            tokens=tokens.book,
            own_former_keys=frozenset(identity.former_keys),
        )
        self._apply_rates()

    def restore_usage(self) -> None:
        """Quotas go on where they were, as far as the history knows."""
        self._history.restore(self._decider.usage)

    # --- the owner's word and settings --------------------------------------------------------

    def set_enabled(self, enabled: bool) -> None:
        """The owner's switch.  Off ends every lent unit; what can be saved is."""
        self._watch.say(enabled=enabled)

    def pause(self, seconds: int) -> None:
        """Give the device back, for so long or until `resume`."""
        until_ms = now_ms() + seconds * 1000 if seconds else 0
        self._watch.say(enabled=self._enabled, order="pause", until_ms=until_ms)

    def resume(self) -> None:
        self._watch.say(enabled=self._enabled)

    def drain(self) -> None:
        """Take no new units; those that run go on to their end."""
        self._watch.say(enabled=self._enabled, order="drain")

    async def set_config(self, config: SharingConfig) -> None:
        """New settings.  Limits of single units hold for those that begin from now on."""
        before, self._config = self._config, config
        self._watch.set_config(config)
        self._apply_rates()
        self._update_policy()
        for session in self._decider.sessions_of_denied():
            if session in self._units:
                self._units[session].stop("owner_stopped", ErrorCode.NOT_ALLOWED)
        if _needs_restart(before, config):
            self._device = None
        self._nudge()
        if self._pool is not None and self._device is not None:
            await self._pool.replace(self._worker_policy(self._device), config.warm_workers)

    def _apply_rates(self) -> None:
        self._line.upload.set_rate(self._config.max_upload_bytes)
        self._line.download.set_rate(self._config.max_download_bytes)

    @property
    def _enabled(self) -> bool:
        return self._watch.switch.enabled

    def _nudge(self) -> None:
        """Something has changed that `run` may wait for."""
        if hasattr(self, "_decider"):
            self._update_policy()
        self._nudged.set()
        self._nudged = trio.Event()

    def _watched(self) -> Watched:
        pids = {os.getpid()}
        for launcher in (self._launcher, self._python_launcher):
            pids |= launcher.pids if launcher is not None else set()
        return Watched(self._candidates(), frozenset(pids))

    def _candidates(self) -> list[Device]:
        """What the settings let us lend, the best first."""
        return [
            device
            for device in self._devices.ranked(self._config.device)
            if device.label not in self._config.exclude_devices
        ]

    def _pick(self) -> Device | None:
        """The device that is lent now; else the best one that its owner leaves to us."""
        found = {device.label: device for device in self._candidates()}
        current = found.get(self._device.label) if self._device else None
        free = [d for d in found.values() if self._watch.decision.of_device(d.label).runs]
        if current in free:
            return current
        return next(iter(free), None) or next(iter(found.values()), None)

    @property
    def decision(self) -> Decision:
        """The owner's, for the device that is lent or would be."""
        device = self._device
        return self._watch.decision.of_device(device.label) if device else self._watch.decision

    # --- on and off -------------------------------------------------------------------------

    async def run(self) -> None:
        """Lend while the owner lets us, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch.run)
            while True:
                self._device = self._pick()
                self._update_policy()
                if not self.decision.lends:
                    await self._nudged.wait()
                    continue
                device = self._device
                async with trio.open_nursery() as lending:
                    lending.start_soon(self._lend, device)
                    while self._may_go_on(device):
                        # Devices come and go without a word: look again now and then.
                        with trio.move_on_after(_RESTART_S):
                            await self._nudged.wait()
                    await self._give_back()
                    lending.cancel_scope.cancel()

    def _may_go_on(self, device: Device | None) -> bool:
        if device is None:
            return not self._candidates() and self.decision.lends
        if self._device is None or self._device.label != device.label:
            return False
        decision = self.decision
        return decision.lends or (decision.runs and self._decider.used_slots > 0)

    async def _give_back(self) -> None:
        """The device is the owner's again within two seconds.

        What workers have saved may then take a while to reach its submitters.
        """
        for unit in list(self._units.values()):
            unit.give_back()
        if self._pool is not None:
            await self._pool.close()
        with trio.move_on_after(_DELIVERY_S):
            for unit in list(self._units.values()):
                await unit.finished.wait()
        await self.stop_units("owner_stopped", ErrorCode.OWNER_RETURNED)

    async def stop_lending(self) -> None:
        """Before a shutdown: every lent unit saves what it can, gets its wipe and its receipt."""
        for unit in list(self._units.values()):
            if unit.state == "running":
                unit.give_back()
            else:
                unit.stop("owner_stopped", ErrorCode.SHUTTING_DOWN)
        with trio.move_on_after(_SHUTDOWN_S):
            for unit in list(self._units.values()):
                await unit.finished.wait()

    async def stop_units(self, status: str, code: ErrorCode, *, grace_s: float = 3) -> None:
        """End every lent unit, each with its wipe and its receipt, within `grace_s`."""
        for unit in list(self._units.values()):
            unit.stop(status, code)
        with trio.move_on_after(grace_s):
            for unit in list(self._units.values()):
                await unit.finished.wait()

    async def _lend(self, device: Device | None) -> None:
        """Launcher and warm workers; started again where the sandbox fails for a while."""
        while True:
            try:
                await self._lend_once(device)
            except* SandboxError as group:
                self._set_trouble(str(group.exceptions[0]))
            await trio.sleep(_RESTART_S)

    async def _lend_once(self, device: Device | None) -> None:
        self.sandbox = await trio.to_thread.run_sync(probe)
        tier = self.sandbox.tier
        if self._config.minimum_isolation != STRONGEST:
            log.warning("sharing.isolation_floor_lowered", floor=self._config.minimum_isolation)
        if tier == "none" or TIERS.index(tier) > TIERS.index(self._config.minimum_isolation):
            missing = ", ".join(layer for layer, _ in self.sandbox.missing) or "unknown"
            self._set_trouble(f"the sandbox lacks layers: {missing}; see `nextgpu doctor`")
            return
        if device is None:
            self._set_trouble(f"there is no device {self._config.device!r} to lend")
            return
        launcher = launcher_for(tier, self._worker_dir)
        async with trio.open_nursery() as nursery:
            await nursery.start(launcher.run)
            self._launcher = launcher
            self._pool = WorkerPool(
                launcher, self._worker_policy(device), self._config.warm_workers
            )
            try:
                await self._pool.fill()
                nursery.start_soon(self._pool.run)
                if self._python_allow:
                    nursery.start_soon(self._launch_python, self._worker_policy(device))
                self._set_trouble("")
                log.info("sharing.started", tier=tier)
                await trio.sleep_forever()
            finally:
                self._pool, self._launcher = None, None
                self._update_policy()

    @property
    def _python_allow(self) -> tuple[str, ...]:
        """Code needs the whole sandbox, whatever the owner accepts for programs."""
        own_terms = map(parse_terms, self._config.peers)
        named = {terms.peer_id for terms in own_terms if "python" in (terms.kinds or ())}
        allowed = sorted({*self._config.python_allow, *named})
        return tuple(allowed) if self.sandbox.tier == "A" else ()

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

    def _set_trouble(self, reason: str) -> None:
        """Why nothing can be lent although the owner would let us; "" for nothing."""
        if reason:
            log.warning("sharing.not_possible", reason=reason)
        self._trouble = reason
        self._update_policy()

    # --- what we are ------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Lending at this moment: the owner lets us, and everything that it takes is there."""
        return self.decision.lends and self._pool is not None and not self._trouble

    @property
    def _state(self) -> tuple[str, str, str]:
        """State, cause and reason, as the local API tells them."""
        decision = self.decision
        if not decision.lends:
            starting = decision.cause == _STARTING
            return _STARTING if starting else decision.state.value, decision.cause, decision.reason
        if self._trouble:
            return "paused", "sandbox", self._trouble
        return ("lending", "", "") if self.is_active else (_STARTING, _STARTING, _STARTING)

    @property
    def _free_slots(self) -> int:
        used = self._decider.used_slots
        return max(0, self._config.max_concurrent_units - used) if self.is_active else 0

    def _policy(self) -> OwnerPolicy:
        config, device = self._config, self._device
        told = self.decision.told or ("" if self.is_active else "not ready")
        return OwnerPolicy(
            sharing=self.is_active,
            reason=told,
            device=self._told_device(device) if device else None,
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
            peer_units=config.peer_units,
            peer_seconds_per_day=config.peer_seconds_per_day,
            terms={PeerId(t.peer_id): t for t in map(parse_terms, config.peers)},
        )

    def _told_device(self, device: Device) -> DeviceInfo:
        """As peers are told: a card with the memory that its owner gives."""
        told, limit = as_message(device), self._vram_bytes(device)
        if not limit:
            return told
        return replace(
            told,
            memory_total_bytes=min(limit, told.memory_total_bytes),
            memory_free_bytes=min(limit, told.memory_free_bytes),
        )

    def _vram_bytes(self, device: Device) -> int:
        if device.kind == "cpu":
            return 0  # memory is memory: max_memory is its limit
        return parse_part(self._config.max_vram).of(device.total_memory_bytes)

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
            tmpfs_bytes=config.max_scratch_bytes,
            utilisation_percent=config.max_utilisation,
            vram_bytes=self._vram_bytes(device),
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
        state, cause, reason = self._state
        return SharingView(
            enabled=self._enabled,
            active=self.is_active,
            reason=reason,
            slots=self._config.max_concurrent_units,
            free_slots=self._free_slots,
            state=state,
            cause=cause,
            until_ms=self.decision.until_ms,
        )

    def device_states(self) -> dict[str, tuple[bool, str, str]]:
        """Label -> whether the settings include it, its state, and why it is not lent."""
        mine, found = {device.label for device in self._candidates()}, {}
        for device in self._devices.all():
            if device.label not in mine:
                found[device.label] = (False, "off", "not lent, by the settings")
            elif self._device is not None and device.label == self._device.label:
                state, _, reason = self._state
                found[device.label] = (True, state, reason)
            else:
                decision = self._watch.decision.of_device(device.label)
                waits = ("paused", "another device is lent") if decision.lends else None
                found[device.label] = (True, *(waits or (decision.state.value, decision.reason)))
        return found

    def serving_view(self) -> ServingReply:
        """Whom the settings name, and what each has used of the last 24 hours."""
        config, at_ms = self._config, now_ms()
        terms = {one.peer_id: one.as_mapping() for one in map(parse_terms, config.peers)}
        rules = dict.fromkeys(terms, "none") | dict.fromkeys(config.allow, "allow")
        rules |= dict.fromkeys(config.deny, "deny")
        peers = [
            ServedPeerView(
                peer_id=peer,
                rule=rule,
                terms=terms.get(peer, {}),
                used_s=self._decider.usage.used_ms((PeerId(peer),), now_ms=at_ms) / 1000,
            )
            for peer, rule in rules.items()
        ]
        return ServingReply(serve=config.serve, peers=peers)

    @property
    def own_pids(self) -> frozenset[int]:
        return self._watched().own_pids

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
                memory_bytes=unit.memory_bytes,
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
            self._line,
        )
        self._units[unit.id] = unit
        try:
            await unit.run()
        finally:
            del self._units[unit.id]
            self._nudge()
            if unit.past is not None:
                self._history.add_soon(unit.past)
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await stream.aclose()

    async def resume_unit(self, stream: PeerStream) -> None:
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

    async def give_lane(self, stream: PeerStream) -> None:
        """Answer a submitter that asks for a bulk lane to its unit."""
        frames = FrameStream(stream)
        with trio.fail_after(_RESUME_DEADLINE_S):
            body = await frames.expect_untrusted(FrameKind.RESUME)
            try:
                resume = open_envelope_untrusted(UnitResume, body)
                unit = self._unit_untrusted(resume.message.unit_id)
                unit.check_submitter_untrusted(resume, PeerId(stream.peer_id))
            except RemoteProtocolError as exc:
                refusal = encode_message(Refusal(int(exc.code), exc.detail[:200]))
                await frames.send(FrameKind.REFUSAL, refusal)
                return
            ends = LaneEnds(
                unit_id=resume.message.unit_id,
                submitter_peer=public_key_from_peer_id(stream.peer_id),
                provider_peer=self._identity.public_key,
            )
            ticket = self.lanes.issue(unit, resume.message.attempt, ends)
            await frames.send(FrameKind.LANE, encode_message(ticket))

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


def _needs_restart(before: SharingConfig, now: SharingConfig) -> bool:
    """Whether what runs now was started under settings that cannot be changed under it."""
    started_with = ("device", "exclude_devices", "minimum_isolation", "python_allow")
    return any(getattr(before, name) != getattr(now, name) for name in started_with)
