"""The fuzzer behind scripts/fuzz: one target of tests/fuzz under atheris.

    scripts/fuzz codec --seconds 600      fuzz, starting from the seeds and the kept corpus
    scripts/fuzz codec --keep             renew the kept corpus from what was found
    scripts/fuzz rows --seconds 600       mutated calls of every operator, findings as JSON lines

What is found on the way lies in build/fuzz/NAME; a finding lies there as crash-… and ends the run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

Target = Callable[[bytes], Any]
Change = Callable[[bytes, int], bytes | None]
Arc = tuple[str, int, int]

PROJECT = Path(__file__).resolve().parent.parent
CORPUS = PROJECT / "tests" / "fuzz" / "corpus"
WORK = PROJECT / "build" / "fuzz"
MAX_INPUT_BYTES = 4096
MAX_KEPT_BYTES = 1024
# What guides the fuzzer, and what it is judged by.
PACKAGES = ("nextgpu_protocol", "nextgpu_node")


def main() -> None:
    sys.path.insert(0, str(PROJECT))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="renew the kept corpus, do not fuzz")
    arguments = parser.parse_args()
    if arguments.target == "rows":
        fuzz_rows(arguments.seconds)
    elif arguments.keep:
        keep(arguments.target)
    else:
        fuzz(arguments.target, arguments.seconds)


def fuzz_rows(seconds: int) -> None:
    """Calls of single operators in guarded memory; a crash ends a child, not the run."""
    WORK.mkdir(parents=True, exist_ok=True)
    library = WORK / "guard_malloc.so"
    source = PROJECT / "tests" / "fuzz" / "guard_malloc.c"
    flags = ["-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(["cc", *flags], check=True)
    guard = {"LD_PRELOAD": str(library), "GUARD_MALLOC": str(library)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.rows", str(seconds)]
    subprocess.run(command, check=True, cwd=PROJECT, env=os.environ | guard)


def fuzz(name: str, seconds: int) -> None:
    """Hand the process to libFuzzer, which ends it."""
    import atheris

    # torch would take minutes to instrument, and is not what is tested.
    import torch  # noqa: F401

    # Before anything else imports that code: it is compiled anew, to tell which branches it takes.
    with atheris.instrument_imports(include=list(PACKAGES)):
        target = find(name)
    found = WORK / name
    found.mkdir(parents=True, exist_ok=True)
    unpack(name, found)
    flags = [f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={found}/", "-timeout=300"]
    arguments = [sys.argv[0], *flags, f"-max_total_time={seconds}", str(found)]
    change = find_change(name)
    if change is None:
        atheris.Setup(arguments, target)
    else:
        # Looked up late: atheris puts another Mutate in place when it starts.
        mutate = mostly(change, lambda data, size: atheris.Mutate(data, size))  # noqa: PLW0108
        atheris.Setup(arguments, target, custom_mutator=mutate)
    atheris.Fuzz()


def mostly(change: Change, mutate: Callable[[bytes, int], bytes]) -> Callable[..., bytes]:
    """Seven changes of eight by the target's own way, the rest by libFuzzer's."""

    def changed(data: bytes, max_size: int, seed: int) -> bytes:
        result = change(bytes(data), seed) if seed % 8 else None
        fits = result is not None and len(result) <= max_size
        return result if fits and result is not None else mutate(data, max_size)

    return changed


def find_change(name: str) -> Change | None:
    from tests.fuzz.targets import CHANGES

    return CHANGES.get(name)


def find(name: str) -> Target:
    from tests.fuzz.targets import TARGETS

    if name not in TARGETS:
        sys.exit(f"There is no target {name!r}: choose one of {', '.join(sorted(TARGETS))}.")
    return TARGETS[name]


def unpack(name: str, into: Path) -> None:
    """The seeds and the kept inputs, as files for libFuzzer."""
    from tests.fuzz.seeds import seeds

    kept = CORPUS / f"{name}.txt"
    lines = kept.read_text("ascii").split() if kept.exists() else []
    for number, data in enumerate([*seeds(name), *map(bytes.fromhex, lines)]):
        (into / f"start-{number:04}").write_bytes(data)


# ------------------------------------------------------------------ the kept corpus


def keep(name: str) -> None:
    """Of what was found, shortest first, each input that goes where none before it went."""
    target = find(name)
    inputs = sorted((path.read_bytes() for path in (WORK / name).iterdir()), key=len)
    seen: set[Arc] = set()
    lines = []
    for data in inputs:
        if len(data) > MAX_KEPT_BYTES:
            break
        arcs = arcs_of(target, data)
        if arcs - seen:
            seen |= arcs
            lines.append(data.hex())
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), "ascii")
    print(f"{name}: kept {len(lines)} of {len(inputs)} inputs, {len(seen)} branches")


def arcs_of(target: Target, data: bytes) -> set[Arc]:
    """Which line followed which in the packages, for one input."""
    arcs: set[Arc] = set()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "call" and not frame.f_globals.get("__name__", "").startswith(PACKAGES):
            return None
        place = id(frame)
        arcs.add((frame.f_code.co_filename, last.get(place, 0), frame.f_lineno))
        last[place] = 0 if event == "return" else frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return arcs


if __name__ == "__main__":
    main()
