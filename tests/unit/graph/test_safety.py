"""No code comes in with a program: no loader, no evaluation, no look-up or import by a name.

The walk starts at the worker's modules and follows their imports of ours, so that what they come to
import is walked too.  The run-time test watches what Python itself reports of a process.
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import nextgpu_node.worker
import nextgpu_protocol
from nextgpu_node.graph.export import export
from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_protocol.program import encode_program

NODE = Path(nextgpu_node.worker.__path__[0]).parent
PROTOCOL = Path(nextgpu_protocol.__path__[0])
OURS = {"nextgpu_node": NODE, "nextgpu_protocol": PROTOCOL}

FORBIDDEN_NAMES = {
    "eval",
    "exec",
    "compile",  # the builtin; re.compile is an attribute
    "getattr",
    "setattr",
    "delattr",
    "vars",
    "locals",
    "globals",
    "__import__",
    "__builtins__",
    "import_module",
    "attrgetter",
    "methodcaller",
    "open",
}
FORBIDDEN_ATTRIBUTES = {
    "__globals__",
    "__subclasses__",
    "__reduce__",
    "__dict__",
    "__getattribute__",
    "__builtins__",
    "modules",  # sys.modules
    "from_file",
    "_jit_get_operation",
    "numpy_from_file",
    "fromfile",
    "memmap",
}
FORBIDDEN_MODULES = {
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "importlib", "imp", "runpy", "pkgutil"),
    *("ctypes", "cffi", "subprocess", "multiprocessing", "builtins", "inspect", "code", "pydoc"),
}
FORBIDDEN_PATHS = {
    *("torch.load", "torch.save", "torch.export", "torch.jit", "torch.package", "torch.hub"),
    *("torch.compile", "torch.classes", "torch.utils.cpp_extension", "os.system", "os.popen"),
    *("numpy.load", "np.load", "torch.serialization"),
}
# Three modules were read and found to be right: how often each name may occur there, and why.
REVIEWED: dict[str, tuple[dict[str, int], str]] = {
    "nextgpu_node": (
        {"importlib": 1, "importlib.import_module": 1, "import_module": 3, "getattr": 1}
        | {"globals": 1},
        "the SDK's public names, from its __all__, for the user's own code; no worker asks for one",
    ),
    "nextgpu_node.worker.main": (
        {"importlib": 1, "importlib.import_module": 1, "import_module": 1},
        "preload, in the launcher and before any unit: torch._dynamo, a literal",
    ),
    "nextgpu_protocol.codec": (
        {"getattr": 3},
        "fields and validators of our own message types, by names that their classes give",
    ),
}


def module_path(name: str) -> Path | None:
    """The file of a module of ours."""
    room, *parts = name.split(".")
    if room not in OURS:
        return None
    base = OURS[room].joinpath(*parts)
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.exists()), None)


def imports(tree: ast.AST) -> set[str]:
    """The modules that a module may import, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reached_from(names: set[str]) -> dict[str, Path]:
    """These modules of ours, and all of ours that they import, in turn."""
    reached: dict[str, Path] = {}
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        path = module_path(name)
        if path is None or name in reached:
            continue
        reached[name] = path
        waiting |= imports(ast.parse(path.read_text()))
        # Importing a module runs the packages above it.
        waiting |= {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)}
    return reached


def worker_modules() -> dict[str, Path]:
    """What a worker of programs runs.  Python units are another kind, in another launcher."""
    return reached_from({"nextgpu_node.worker.main"})


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        if isinstance(node, ast.Attribute):
            path = dotted(node)
            hidden = node.attr in FORBIDDEN_NAMES - {"compile"} or node.attr in FORBIDDEN_ATTRIBUTES
            if hidden or path in FORBIDDEN_PATHS:
                found.append(path)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [
                name
                for name in sorted(imports(node))
                if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_PATHS
            ]
    return found


def test_the_walk_reaches_everything_the_worker_imports_of_ours():
    reached = worker_modules()
    assert {
        *REVIEWED,
        "nextgpu_node.worker.unit",
        "nextgpu_node.graph.machine",
        "nextgpu_node.graph.plan",
        "nextgpu_node.graph.optable",
        "nextgpu_node.graph.bounds",
        "nextgpu_node.graph.tensors",
        "nextgpu_protocol.program_wire",
        "nextgpu_protocol.records",
        "nextgpu_protocol.sealing",
    } <= reached.keys()
    # Nothing of the submitter's side, whose business it is to run its own user's code.
    rooms = ("sdk", "cli", "daemon", "p2p", "sandbox", "api", "core")
    assert not {
        name for name in reached if name.startswith(tuple(f"nextgpu_node.{r}" for r in rooms))
    }
    assert not {"nextgpu_node.graph.export", "nextgpu_node.graph.emit"} & reached.keys()
    # Functions of submitters that an owner named are unpickled elsewhere, never here.
    assert not {"nextgpu_node.worker.python", "nextgpu_node.worker.versions"} & reached.keys()


def test_no_code_can_come_in_through_the_modules_of_the_worker():
    for name, path in worker_modules().items():
        reviewed, _ = REVIEWED.get(name, ({}, ""))
        assert Counter(findings(path.read_text())) == reviewed, name


def test_the_walk_finds_what_it_looks_for():
    bad = [
        "torch.load(f)",
        "import pickle",
        "from importlib import import_module",
        "getattr(torch, n)",
        "operator.attrgetter(n)",
        "eval('1')",
        "f = exec",
        "import torch.export",
        "from torch import jit",
        "torch.classes.load_library(n)",
        "sys.modules[n]",
        "f.__globals__",
        "import ctypes",
        "np.memmap(n)",
        "open(n)",
        "pathlib.Path(n).open()",
    ]
    assert [line for line in bad if not findings(line)] == []


def test_the_worker_starts_without_the_exporter():
    # torch imports a part of torch.export itself; what counts is what this room adds to torch.
    code = (
        "import sys, torch; before = set(sys.modules);"
        "import nextgpu_node.graph.machine, nextgpu_node.graph.tensors;"
        "added = set(sys.modules) - before;"
        "print(*sorted(name for name in added if name.endswith(('.export', '.emit'))"
        " or name.split('.')[0] in ('torch', 'transformers', 'sympy', 'safetensors')))"
    )
    # -W: this is about what is imported, not about what torch warns of.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


# ---------------------------------------------------------------- at run time

# In a process of its own: an audit hook can not be taken away again.
WATCHED = """
import struct, sys
import torch
from nextgpu_node.graph.machine import Machine
from nextgpu_node.graph.tensors import TensorImageReader
from nextgpu_node.worker.main import preload
from nextgpu_protocol.program import decode_program_untrusted

def read(expected, image):
    reader = TensorImageReader(expected, max_bytes=10**9)
    reader.feed_untrusted(image)
    return reader.finish_untrusted()

def load_and_run(program, constants, x):
    spec = decode_program_untrusted(program)
    machine = Machine(spec, device="cpu", max_live_bytes=10**9)
    machine.load_constants(read(spec.constants, constants))
    machine.load_carry({})
    {attack}
    return machine.step(read(spec.xs, x)).ys

pieces = []
while head := sys.stdin.buffer.read(8):
    pieces.append(sys.stdin.buffer.read(struct.unpack(">Q", head)[0]))
preload()
events, watching = [], True
sys.addaudithook(lambda event, args: events.append(event) if watching else None)
ys = load_and_run(*pieces)
watching = False
assert all(bool(torch.isfinite(y).all()) for y in ys.values())
print(*sorted(set(events)))
"""


class Everyday(nn.Module):
    """Attention, convolution, recurrence, indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(x)[:, None]
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x.softmax(-1).topk(3).values.sum(-1)


def watched_events(attack: str = "pass") -> set[str]:
    tokens = torch.randint(0, 16, (2, 6))
    program = export(Everyday().eval(), (tokens,), dynamic={"tokens": {1: "length"}})
    images = (program.constants, {program.spec.xs[0].name: tokens})
    pieces = [encode_program(program.spec)]
    pieces += [b"".join(bytes(piece) for piece in encode_tensors(image)) for image in images]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED.replace("{attack}", attack)],
        input=b"".join(len(piece).to_bytes(8) + piece for piece in pieces),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return set(done.stdout.decode().split())


def test_loading_and_running_a_program_opens_imports_and_compiles_nothing():
    # builtins.id: torch counts its tensors.
    assert watched_events() <= {"builtins.id"}


def test_the_watch_sees_what_it_looks_for():
    attack = "import this; eval('1'); open('/dev/null').close()"
    assert watched_events(attack) >= {"import", "compile", "exec", "open"}
