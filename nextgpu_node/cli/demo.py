"""`nextgpu demo`: the main job on this machine, through the commands that users use.

three daemons on loopback      a DHT node to bootstrap from, a provider, a submitter
nextgpu peers                  the submitter finds the provider by need, not by address
nextgpu export                 MiniLM becomes a program: data, no code
nextgpu run                    sealed to one worker process, run in its sandbox, sealed back
here                           the same model run locally, to compare
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from nextgpu_node.cli.output import SCHEMA
from nextgpu_node.cli.processes import DaemonProcess, run_cli, wait_until
from nextgpu_node.errors import NextGPUError
from nextgpu_protocol.messages import OWNER_WIPE_STEPS

if TYPE_CHECKING:
    from torch import Tensor

_MODEL = "nextgpu_node.cli.demo_model:embedder"
_PEER_DEADLINE_S = 60
_GONE_DEADLINE_S = 10
_NEAREST = 3
# Float32 sums in another order: the same kernels give 0, other thread counts the last bits.
_TOLERANCE = 1e-4
# A text file of the demo, so it is in this repository; it must be nowhere in the nodes' files.
_CANARY = b"wakes the yeast up faster"


@dataclass(slots=True)
class Demo:
    """What the demo learns on its way; `say` talks to a person, the report to a program."""

    quiet: bool
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str = "") -> None:
        print(text, file=sys.stderr if self.quiet else sys.stdout, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began_s, 2)


@dataclass(frozen=True, slots=True)
class Sentences:
    """The demo's text: every sentence, and which of them are queries."""

    texts: list[str]
    queries: list[int]

    @classmethod
    def load(cls) -> Sentences:
        source = resources.files("nextgpu_node.cli").joinpath("demo_sentences.txt")
        lines = [line.strip() for line in source.read_text().splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        queries = [index for index, line in enumerate(lines) if line.startswith("?")]
        return cls([line.removeprefix("?").strip() for line in lines], queries)


def run(json_output: bool) -> int:
    """The whole demo; 0 only if every claim held."""
    demo = Demo(quiet=json_output)
    # Below the system's own temporary directory: a unix socket's path has room for 107 bytes.
    work = Path(tempfile.mkdtemp(prefix="nextgpu-demo-"))
    began_s = time.monotonic()
    try:
        with ExitStack() as stack:
            _run_phases(demo, work, stack)
    except NextGPUError as exc:
        demo.say(f"The demo stopped: {exc}")
        demo.facts["error"] = str(exc)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    demo.seconds["total"] = round(time.monotonic() - began_s, 2)
    return _report(demo, json_output)


def _run_phases(demo: Demo, work: Path, stack: ExitStack) -> None:
    """Export is the longest part and needs no node; the local run is needed only at the end."""
    sentences = Sentences.load()
    pool = stack.enter_context(ThreadPoolExecutor(2))
    exported = pool.submit(_export, demo, work, sentences)
    with demo.phase("start_daemons"):
        provider, submitter = _start_daemons(demo, work, stack)
    with demo.phase("find_peer"):
        _find_peer(demo, submitter, provider)
    size_mb = exported.result() / 1e6
    demo.say(f"exported MiniLM to a program of {size_mb:.0f} MB: operators and weights, no code")
    local = pool.submit(_embed_locally, sentences)
    workers = _worker_pids(provider.pid)
    with demo.phase("run"):
        _run_remotely(demo, work, submitter)
    with demo.phase("verify_wipe"):
        _verify_wipe(demo, provider, submitter, workers)
    with demo.phase("compare"):
        _compare(demo, work, sentences, local.result())


def _start_daemons(demo: Demo, work: Path, stack: ExitStack) -> tuple[DaemonProcess, DaemonProcess]:
    """The three daemons; the provider still fetches its launcher when this returns."""
    bootstrap = [stack.enter_context(DaemonProcess(work / "dht")).wait_ready().address]
    # Tier C is the floor for this demo: where the host refuses namespaces, it says so and runs.
    lending = {"sharing.enabled": "true", "sharing.minimum_isolation": "C"}
    provider = stack.enter_context(
        DaemonProcess(work / "lend", bootstrap=bootstrap, settings=lending)
    )
    submitter = stack.enter_context(DaemonProcess(work / "borrow", bootstrap=bootstrap))
    provider.wait_ready()
    submitter.wait_ready()
    demo.say("three nodes on loopback: a DHT node, a provider, a submitter")
    return provider, submitter


def _export(demo: Demo, work: Path, sentences: Sentences) -> int:
    """Write the inputs and the program; its size in bytes."""
    from safetensors.torch import save_file

    from nextgpu_node.cli.demo_model import tokenize

    with demo.phase("export"):
        save_file(tokenize(sentences.texts), work / "sentences.safetensors")
        example = tokenize(sentences.texts[:2])
        save_file(example, work / "example.safetensors")
        sizes = [f"{name}:{axis}={s}" for name in example for axis, s in enumerate(("b", "t"))]
        dynamic = [argument for size in sizes for argument in ("--dynamic", size)]
        reply = run_cli(
            work, "export", _MODEL, "-o", str(work / "minilm.ngp"),
            "--example", str(work / "example.safetensors"), *dynamic,
        )  # fmt: skip
    return int(str(reply["bytes"]))


def _find_peer(demo: Demo, submitter: DaemonProcess, provider: DaemonProcess) -> None:
    def found() -> bool:
        peers: Any = run_cli(submitter.home, "peers", "--vram", "1", check=False).get("peers", [])
        if not peers:
            return False
        demo.facts["peer"] = peers[0]
        return True

    wait_until(found, _PEER_DEADLINE_S, "a peer with at least 1 GB")
    peer = demo.facts["peer"]
    if peer["peer_id"] != provider.ready.peer_id:
        raise NextGPUError("The peer that was found is not the provider of the demo.")
    device = peer["devices"][0]
    gigabytes = device["memory_total_bytes"] / 1e9
    note = " (no GPU here)" if device["kind"] == "cpu" else ""
    demo.say(f"found by need over the DHT: {peer['peer_id']}")
    demo.say(f"  {device['kind']}{note}: {device['name']}, {gigabytes:.1f} GB, {peer['runtime']}")


def _run_remotely(demo: Demo, work: Path, submitter: DaemonProcess) -> None:
    reply = run_cli(
        submitter.home, "run", str(work / "minilm.ngp"), "--quiet",
        "--input", str(work / "sentences.safetensors"),
        "--output", str(work / "embeddings.safetensors"),
        "--receipt", str(work / "receipt.json"),
    )  # fmt: skip
    demo.facts["run"] = reply
    receipt = json.loads((work / "receipt.json").read_text())["receipt"]
    demo.facts["receipt"] = receipt
    wall_ms = receipt["metering"]["wall_ms"]
    demo.say(f"ran there in {wall_ms} ms, sealed to the worker process both ways")
    demo.say(f"  isolation: {', '.join(receipt['isolation'])}")
    demo.say(f"  receipt verified: {receipt['status']}, signed by {reply['peer_id']}")


def _worker_pids(provider_pid: int) -> set[int]:
    """Every process below the provider: its launcher, and the worker that waits for the unit."""
    return {child.pid for child in psutil.Process(provider_pid).children(recursive=True)}


def _verify_wipe(
    demo: Demo, provider: DaemonProcess, submitter: DaemonProcess, before: set[int]
) -> None:
    """The worker that served is gone, nothing of the text is in the nodes' files."""
    launcher = {child.pid for child in psutil.Process(provider.pid).children()}
    served = before - launcher

    def gone() -> bool:
        return not served & _worker_pids(provider.pid)

    wait_until(gone, _GONE_DEADLINE_S, "the worker to be gone")
    steps = demo.facts["receipt"]["wipe"]
    traces = _files_with_canary([provider.home, submitter.home])
    failed = [s for s in steps if not s["held"] and s["name"] not in OWNER_WIPE_STEPS]
    demo.facts["state_wiped"] = bool(steps) and not failed and not traces
    done = ", ".join(step["name"] for step in steps if step["held"])
    demo.say(f"wiped: {done}; {len(traces)} traces of the text in the nodes' files")


def _files_with_canary(directories: list[Path]) -> list[Path]:
    files = [file for top in directories for file in top.rglob("*") if file.is_file()]
    return [file for file in files if _CANARY in file.read_bytes()]


def _embed_locally(sentences: Sentences) -> Tensor:
    """The same model on the same tokens, here."""
    import torch

    from nextgpu_node.cli.demo_model import embedder, tokenize

    torch.set_num_threads(1)
    with torch.inference_mode():
        embeddings: Tensor = embedder()(**tokenize(sentences.texts))["embedding"]
    return embeddings


def _compare(demo: Demo, work: Path, sentences: Sentences, local: Tensor) -> None:
    from safetensors.torch import load_file

    remote = load_file(work / "embeddings.safetensors")["embedding"]
    demo.facts["max_abs_diff"] = float((remote - local).abs().max())
    demo.facts["cosine"] = float((remote * local).sum(-1).min())
    demo.say()
    _print_nearest(demo, sentences, remote)
    demo.say(
        f"compared with the same model run here: largest difference "
        f"{demo.facts['max_abs_diff']:.2e}, smallest cosine {demo.facts['cosine']:.6f}"
    )


def _print_nearest(demo: Demo, sentences: Sentences, embeddings: Tensor) -> None:
    others = [i for i in range(len(sentences.texts)) if i not in sentences.queries]
    for query in sentences.queries:
        similarity = embeddings[others] @ embeddings[query]
        demo.say(f"? {sentences.texts[query]}")
        for place in similarity.argsort(descending=True)[:_NEAREST].tolist():
            demo.say(f"    {similarity[place]:.2f}  {sentences.texts[others[place]]}")
    demo.say()


def _report(demo: Demo, json_output: bool) -> int:
    """The last line for programs; the exit code for both."""
    receipt = demo.facts.get("receipt", {})
    peer = demo.facts.get("peer", {})
    verified = receipt.get("status") == "done"
    difference = demo.facts.get("max_abs_diff")
    close = difference is not None and difference <= _TOLERANCE
    ok = verified and close and bool(demo.facts.get("state_wiped"))
    report = {
        "schema": SCHEMA,
        "ok": ok,
        "provider_peer_id": peer.get("peer_id"),
        "device": (peer.get("devices") or [None])[0],
        "isolation": receipt.get("isolation", []),
        "max_abs_diff": difference,
        "cosine": demo.facts.get("cosine"),
        "receipt_verified": verified,
        "state_wiped": bool(demo.facts.get("state_wiped")),
        "seconds": demo.seconds,
    }
    if "error" in demo.facts:
        report["error"] = demo.facts["error"]
    if json_output:
        print(json.dumps(report))
    else:
        verdict = "all of it held" if ok else "NOT all of it held"
        demo.say(f"{verdict}, in {demo.seconds['total']:.1f} s")
    return 0 if ok else 1
