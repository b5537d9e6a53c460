"""What the worker imports of this room: no loaders, no evaluation, no import by name."""

import ast
import subprocess
import sys
from pathlib import Path

import nextgpu_node.graph
import nextgpu_protocol

ROOM = Path(nextgpu_node.graph.__path__[0])
PROTOCOL = Path(nextgpu_protocol.__path__[0])
SUBMITTER_ONLY = {
    "calls.py",
    "describe.py",
    "emit.py",
    "explain.py",
    "export.py",
    "local.py",
    "lower.py",
    "recurrent.py",
    "rules.py",
}
FORBIDDEN_NAMES = {
    "eval",
    "exec",
    "compile",  # the builtin; re.compile is an attribute
    "getattr",
    "setattr",
    "globals",
    "__import__",
    "import_module",
    "attrgetter",
    "methodcaller",
    "open",
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "marshal", "shelve", "importlib", "ctypes", "runpy"}
FORBIDDEN_PATHS = {"torch.load", "torch.save", "torch.export", "torch.jit", "torch.package"}
# The file format reads and writes files; programs never reach these functions.
MAY_OPEN = {"artifact.py"}


def worker_modules() -> list[Path]:
    ours = [path for path in ROOM.glob("*.py") if path.name not in SUBMITTER_ONLY]
    return [*ours, *PROTOCOL.glob("program*.py")]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def findings(source: str, *, may_open: bool = False) -> list[str]:
    found = []
    forbidden = FORBIDDEN_NAMES - ({"open"} if may_open else set())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in forbidden:
            found.append(node.id)
        if isinstance(node, ast.Attribute):
            path = dotted(node)
            if node.attr in forbidden - {"compile"} or path in FORBIDDEN_PATHS:
                found.append(path)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            for name in (base, *names):
                if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_PATHS:
                    found.append(name)
    return found


def test_no_code_can_come_in_through_the_modules_of_the_worker():
    assert len(worker_modules()) >= 10
    for path in worker_modules():
        assert findings(path.read_text(), may_open=path.name in MAY_OPEN) == [], path.name


def test_the_walk_finds_what_it_looks_for():
    bad = [
        "torch.load(f)",
        "import pickle",
        "from importlib import import_module",
        "getattr(torch, n)",
        "operator.attrgetter(n)",
        "eval('1')",
        "import torch.export",
        "from torch import jit",
    ]
    assert all(findings(line) for line in bad)


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
