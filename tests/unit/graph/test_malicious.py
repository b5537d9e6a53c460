"""Malicious programs: each refused with its own code, naming the place, at little cost."""

import resource
import time

import pytest
import torch

from nextgpu_node.graph.machine import _MAX_PLANS, Machine
from nextgpu_node.graph.plan import Plan
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.program import decode_program_untrusted
from tests.support import malice
from tests.support.malice import MAX_LIVE_BYTES, Malice, node, program, ref

# Of one core, for the worst of them: a million tokens are counted before anything is built.
MAX_CPU_S = 10.0
# What the worst of them, 4 MiB, may take.
MAX_GROWTH_BYTES = 200 * 1024**2


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """All of them together: what this process ever took, before and after."""
    with pytest.raises(RemoteProtocolError):
        # torch loads a part of itself for its first shape run.
        meet(malice.PLANNED["a triangle of 2^40 rows"])
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib * 1024 < MAX_GROWTH_BYTES


def meet(bad: Malice) -> None:
    """What a worker does with a program and its first inputs."""
    spec = decode_program_untrusted(bad.data)
    machine = Machine(spec, device="cpu", max_live_bytes=MAX_LIVE_BYTES)
    if spec.carry:
        machine.load_carry({one.name: torch.ones(one.shape) for one in spec.carry})
    machine.step(bad.inputs)


@pytest.mark.parametrize("name", malice.ALL)
def test_it_is_refused_with_its_own_code_before_any_kernel_runs(name, monkeypatch):
    bad, runs = malice.ALL[name], []
    monkeypatch.setattr(Plan, "run", lambda self, inputs: runs.append(self))
    began_s = time.process_time()
    with pytest.raises(RemoteProtocolError) as caught:
        meet(bad)
    cpu_s = time.process_time() - began_s
    assert caught.value.code is bad.code, caught.value
    assert bad.place in caught.value.detail
    assert len(caught.value.detail) < 500
    assert runs == []
    assert cpu_s < MAX_CPU_S


def test_there_are_many_and_no_two_are_the_same():
    assert len(malice.ALL) == len(malice.DECODED) + len(malice.LINKED) + len(malice.PLANNED)
    assert len(malice.ALL) >= 120
    assert len({(bad.data, *bad.inputs) for bad in malice.ALL.values()}) >= 120


def test_a_step_bomb_ends_at_its_limit():
    spec = decode_program_untrusted(program(malice.RELU))
    machine = Machine(spec, device="cpu", max_live_bytes=MAX_LIVE_BYTES, max_steps=3)
    for _ in range(3):
        machine.step({"x": torch.ones(4, 6)})
    with pytest.raises(RemoteProtocolError) as caught:
        machine.step({"x": torch.ones(4, 6)})
    assert caught.value.code is ErrorCode.OVER_LIMIT
    assert "more than 3 steps" in caught.value.detail


def test_thousands_of_sizes_do_not_fill_the_plan_cache():
    spec = decode_program_untrusted(
        program(malice.RELU, symbols=[["n", 1, 10**6]], xs=[["x", "float32", ["n", 1]]])
    )
    machine = Machine(spec, device="cpu", max_live_bytes=MAX_LIVE_BYTES)
    for rows in range(1, 1000):
        machine.step({"x": torch.ones(rows, 1)})
    assert len(machine._plans) == _MAX_PLANS


def test_a_step_without_its_constants_is_our_own_mistake():
    spec = decode_program_untrusted(
        program(node("aten.add.Tensor", ref(0), ref(1)), constants=[malice.X], outputs=[2])
    )
    machine = Machine(spec, device="cpu", max_live_bytes=MAX_LIVE_BYTES)
    with pytest.raises(LocalProtocolError, match="constants"):
        machine.step({"x": torch.ones(4, 6)})
