"""One node: every room wired together, in one nursery.

peers ──libp2p──► Provider (lends)             CLI, SDK ──api.sock───► Backend
                  capacity record                       ──units.sock─► Borrowing (relays)
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from importlib.metadata import version

import msgspec
import psutil
import structlog
import trio
from starlette.types import ASGIApp

from nextgpu_node.api import server as api_server
from nextgpu_node.api.sockets import listen_private, remove_listening
from nextgpu_node.api.web import Web
from nextgpu_node.api_types import (
    GpusReply,
    HistoryReply,
    InviteReply,
    InviteRequest,
    InvitesReply,
    LimitsReply,
    PeerNeed,
    PeersReply,
    RevokeReply,
    ServingReply,
    SharingView,
    StatusReply,
    UnitsReply,
    UnitView,
)
from nextgpu_node.config import Config, read_changes, set_values, with_changes
from nextgpu_node.daemon.borrowing import (
    LANE_PROTOCOL,
    RESUME_PROTOCOL,
    UNIT_PROTOCOL,
    Borrowing,
)
from nextgpu_node.daemon.desk import OwnersDesk
from nextgpu_node.daemon.devices import HostDevices
from nextgpu_node.daemon.history import History
from nextgpu_node.daemon.known_peers import (
    load_known_peers,
    save_known_peers,
    save_known_peers_forever,
)
from nextgpu_node.daemon.peers import (
    CAPACITY_PROTOCOL,
    PeerFinder,
    announce_forever,
    serve_capacity,
    withdraw,
)
from nextgpu_node.daemon.provider import Provider
from nextgpu_node.daemon.successions import (
    SUCCESSIONS_PROTOCOL,
    FormerKeys,
    serve_successions,
)
from nextgpu_node.daemon.tokens import Tokens
from nextgpu_node.errors import ConfigError
from nextgpu_node.hostinfo.sensors import HostSensors, Sensors
from nextgpu_node.identity import Identity
from nextgpu_node.p2p.lanes import LaneListener
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_node.paths import Paths, ensure_private_dir
from nextgpu_node.private_network import read_network_key
from nextgpu_node.sharing_settings import limit_views, serving_changes

log = structlog.get_logger()

_MAX_LOCAL_CLIENTS = 64


class Node:
    """The daemon's object.  Implements `api_types.Backend`."""

    def __init__(
        self, config: Config, paths: Paths, identity: Identity, sensors: Sensors | None = None
    ) -> None:
        """`sensors` are this machine's own where none are given."""
        self._config = config
        self._paths = paths
        self._identity = identity
        self._began_s = time.monotonic()
        self._addresses: list[str] = []
        self._devices = HostDevices()
        self._tokens = Tokens(paths.tokens_file, identity)
        self._remembers_peers = (
            config.network.remember_peers and config.node.identity == "persistent"
        )
        known_peers = load_known_peers(paths.known_peers_file, allowed=self._remembers_peers)
        handlers = {
            UNIT_PROTOCOL: self._serve_unit,
            RESUME_PROTOCOL: self._serve_resume,
            CAPACITY_PROTOCOL: self._serve_capacity,
            SUCCESSIONS_PROTOCOL: self._serve_successions,
        }
        if self._has_lanes:
            handlers[LANE_PROTOCOL] = self._serve_lane_request
        network_key = read_network_key(paths.network_key_file)
        self._network = Network(_p2p_settings(config, identity, known_peers, network_key), handlers)
        self._history = History(paths.unit_history_file, config.history)
        self._provider = Provider(
            config.sharing,
            identity,
            self._devices,
            paths.worker_dir,
            self._tokens,
            FormerKeys(self._network),
            self._history,
            sensors or HostSensors(paths.state_dir),
            paths.owner_file,
        )
        self._borrowing = Borrowing(self._network, identity)
        self._finder = PeerFinder(self._network)
        self._desk = self._make_desk()
        self._local_clients = trio.CapacityLimiter(_MAX_LOCAL_CLIENTS)

    @property
    def _has_lanes(self) -> bool:
        """A node that only dials out can not be dialled for a lane either."""
        return self._config.network.lane and bool(self._config.network.listen)

    async def run(
        self, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Everything, until cancelled.  Starts with this node's own multiaddrs."""
        for directory in (self._paths.state_dir, self._paths.worker_dir):
            ensure_private_dir(directory)
        # First of all the socket's name: it tells a second daemon of this home to stop here.
        unit_socket = listen_private(self._paths.units_socket)
        try:
            self._tokens.open()
            self._history.open()
            self._provider.restore_usage()
            async with trio.open_nursery() as nursery:
                self._addresses = await nursery.start(self._network.run)
                await nursery.start(self._desk.run)
                if self._has_lanes:
                    await self._open_lanes(nursery)
                await nursery.start(api_server.run, self, self._paths.api_socket, self._desk)
                nursery.start_soon(self._serve_unit_socket, unit_socket)
                nursery.start_soon(self._devices.run)
                nursery.start_soon(self._history.run)
                nursery.start_soon(self._provider.run)
                nursery.start_soon(announce_forever, self._network, self._provider.capability_keys)
                if self._remembers_peers:
                    path = self._paths.known_peers_file
                    nursery.start_soon(save_known_peers_forever, self._network, path)
                task_status.started(self._addresses)
        finally:
            self._tokens.close()
            self._history.close()
            remove_listening(self._paths.units_socket, unit_socket)

    def _make_desk(self) -> OwnersDesk:
        config = self._config.web

        def make_app(host: str) -> ASGIApp:
            return api_server.build_app(self, self._desk, host)

        web = Web(make_app, config.port, self._paths.web_token_file)
        return OwnersDesk(self, self.gpus, self._paths, web, open_web=config.open)

    async def _open_lanes(self, nursery: trio.Nursery) -> None:
        network, lanes = self._config.network, self._provider.lanes
        listener = LaneListener(network.listen, network.lane_port)
        lanes.opens(await nursery.start(listener.run, lanes.serve))

    async def stop_lending(self) -> None:
        """Before a shutdown: every lent unit gets its wipe and its receipt, and the network hears
        that nothing is lent here any more."""
        if self._remembers_peers:
            save_known_peers(self._network, self._paths.known_peers_file)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(withdraw, self._network)
            await self._provider.stop_lending()

    # --- Backend ----------------------------------------------------------------------------

    def status(self) -> StatusReply:
        sandbox = self._provider.sandbox
        return StatusReply(
            version=version("nextgpu-node"),
            peer_id=self._identity.peer_id,
            addresses=self._addresses,
            uptime_s=round(time.monotonic() - self._began_s, 1),
            connected_peers=self._network.connected_peers(),
            sharing=self._provider.sharing_view(),
            devices=self._devices.views(),
            runtime=self._provider.runtime,
            isolation=list(sandbox.layers),
            isolation_tier=sandbox.tier,
            rss_bytes=psutil.Process().memory_info().rss,
        )

    async def peers(self, need: PeerNeed) -> PeersReply:
        return await self._finder.find(need)

    def units(self) -> UnitsReply:
        now_s = time.monotonic()
        borrowed = [
            UnitView(
                unit_id=relay.unit_id,
                role="borrowing",
                state="running" if relay.unit_id else "starting",
                age_s=round(now_s - relay.began_s, 3),
                input_bytes=relay.input_bytes,
                output_bytes=relay.output_bytes,
            )
            for relay in self._borrowing.relays
        ]
        return UnitsReply(units=self._provider.unit_views() + borrowed)

    async def cancel_unit(self, unit_id: str) -> bool:
        return self._provider.cancel(unit_id) or await self._borrowing.cancel(unit_id)

    def set_sharing(self, enabled: bool) -> SharingView:
        """Switch lending, now and for the next start."""
        # Off is off even where the file can not be written; the owner hears about the rest.
        self._provider.set_enabled(enabled)
        note = self._save({"sharing.enabled": "true" if enabled else "false"})
        return msgspec.structs.replace(self._provider.sharing_view(), note=note)

    def pause(self, seconds: int) -> SharingView:
        self._provider.pause(seconds)
        return self._provider.sharing_view()

    def resume(self) -> SharingView:
        self._provider.resume()
        return self._provider.sharing_view()

    def drain(self) -> SharingView:
        self._provider.drain()
        return self._provider.sharing_view()

    async def gpus(self) -> GpusReply:
        return await self._devices.gpus(self._provider.device_states(), self._provider.own_pids)

    def limits(self) -> LimitsReply:
        return LimitsReply(limits=limit_views(self._config.sharing))

    async def set_limits(self, changes: dict[str, str]) -> LimitsReply:
        note = await self._change({f"sharing.{key}": text for key, text in changes.items()})
        return LimitsReply(limits=limit_views(self._config.sharing), saved=not note, note=note)

    def serving(self) -> ServingReply:
        return self._provider.serving_view()

    async def set_serving(self, peer_id: str, rule: str, terms: dict[str, str]) -> ServingReply:
        note = await self._change(serving_changes(self._config.sharing, peer_id, rule, terms))
        return msgspec.structs.replace(self._provider.serving_view(), saved=not note, note=note)

    async def history(self, limit: int) -> HistoryReply:
        return await self._history.newest(limit)

    async def clear_history(self) -> HistoryReply:
        return await self._history.clear()

    async def set_history(self, enabled: bool) -> HistoryReply:
        await self._change({"history.record": "true" if enabled else "false"})
        return await self._history.newest(1)

    async def _change(self, changes: dict[str, str]) -> str:
        """Settings for now and for the next start; why they could not be saved, or ""."""
        self._config = with_changes(self._config, read_changes(changes))
        await self._provider.set_config(self._config.sharing)
        await self._history.set_config(self._config.history)
        return self._save(changes)

    def _save(self, changes: dict[str, str]) -> str:
        try:
            set_values(self._paths.config_file, changes)
        except ConfigError as exc:
            return str(exc)
        return ""

    async def issue_token(self, wanted: InviteRequest) -> InviteReply:
        return await self._tokens.issue(wanted)

    def issued_tokens(self) -> InvitesReply:
        return InvitesReply(invites=self._tokens.views())

    async def revoke_token(self, id_text: str) -> RevokeReply:
        invite = await self._tokens.revoke(id_text, self._provider.end_units_under)
        return RevokeReply(invite=invite)

    # --- streams ----------------------------------------------------------------------------

    async def _serve_unit(self, stream: PeerStream) -> None:
        await self._provider.serve(stream)

    async def _serve_resume(self, stream: PeerStream) -> None:
        await self._provider.resume_unit(stream)

    async def _serve_lane_request(self, stream: PeerStream) -> None:
        await self._provider.give_lane(stream)

    async def _serve_capacity(self, stream: PeerStream) -> None:
        await serve_capacity(stream, self._provider.capacity_record)
        await stream.aclose()

    async def _serve_successions(self, stream: PeerStream) -> None:
        await serve_successions(stream, self._identity.successions)
        await stream.aclose()

    async def _serve_unit_socket(self, unit_socket: socket.socket) -> None:
        # A duplicate: trio closes what it is given, and the name is ours to remove.
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(unit_socket.dup()))
        await trio.serve_listeners(self._serve_local, [listener])

    async def _serve_local(self, stream: trio.SocketStream) -> None:
        async with self._local_clients:
            await self._borrowing.serve(stream)


def _p2p_settings(
    config: Config,
    identity: Identity,
    known_peers: tuple[str, ...],
    network_key: bytes | None,
) -> P2PSettings:
    network = config.network
    bootstrap: Sequence[str] = network.bootstrap
    return P2PSettings(
        key_seed=bytes(identity.signing_key),
        listen_addrs=network.listen,
        announce_addrs=network.announce,
        bootstrap=tuple(bootstrap),
        known_peers=known_peers,
        network_key=network_key,
        # "auto" is a server until reachability is known: a client would not be found.
        dht_mode="client" if network.mode == "client" else "server",
    )
