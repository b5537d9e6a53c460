"""Figures of this node in Prometheus' text format, version 0.0.4.

No ids, no peers, no names, no content: only numbers, with labels from fixed lists of words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from nextgpu_node.api_types import GpuView, StatusReply, UnitView


def as_text(
    status: StatusReply,
    units: Sequence[UnitView],
    gpus: Sequence[GpuView],
    logged: Mapping[str, int],
) -> bytes:
    """The figures of one moment.  `logged` counts events of the log by name."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Moment([*_node(status), *_units(units), *_devices(gpus), *_events(logged)]))
    return generate_latest(registry)


class _Moment(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _node(status: StatusReply) -> Iterator[Metric]:
    sharing = status.sharing
    build = GaugeMetricFamily(
        "nextgpu_build_info", "Version and sandbox tier; always 1.", labels=("version", "tier")
    )
    build.add_metric((status.version, status.isolation_tier), 1)
    yield build
    for name, what, value in (
        ("uptime_seconds", "Since the daemon began.", status.uptime_s),
        ("connected_peers", "Peers with an open connection.", status.connected_peers),
        ("sharing_enabled", "1 where the owner has switched lending on.", sharing.enabled),
        ("sharing_active", "1 while this node lends.", sharing.active),
        ("slots", "Units that may run at a time.", sharing.slots),
        ("free_slots", "Units that could begin now.", sharing.free_slots),
    ):
        yield GaugeMetricFamily(f"nextgpu_{name}", what, value=float(value))


def _units(units: Sequence[UnitView]) -> Iterator[Metric]:
    counts = Counter((unit.role, unit.state) for unit in units)
    family = GaugeMetricFamily(
        "nextgpu_units", "Work units that are here now.", labels=("role", "state")
    )
    for (role, state), count in sorted(counts.items()):
        family.add_metric((role, state), count)
    yield family


def _devices(gpus: Sequence[GpuView]) -> Iterator[Metric]:
    for name, what, attribute in (
        ("memory_total_bytes", "Memory of the device.", "memory_total_bytes"),
        ("memory_free_bytes", "Memory that nobody uses.", "memory_free_bytes"),
        ("utilisation_ratio", "How busy it is, 0 to 1.", "utilisation"),
        ("temperature_celsius", "Of its own sensor.", "temperature_c"),
        ("power_watts", "What it draws.", "power_w"),
    ):
        family = GaugeMetricFamily(f"nextgpu_device_{name}", what, labels=("device",))
        for gpu in gpus:
            value = getattr(gpu, attribute)
            if value is not None:
                family.add_metric((gpu.label,), float(value))
        yield family


def _events(logged: Mapping[str, int]) -> Iterator[Metric]:
    family = CounterMetricFamily(
        "nextgpu_log_events", "Events of the log, by their fixed names.", labels=("event",)
    )
    for event, count in sorted(logged.items()):
        family.add_metric((event,), count)
    yield family
