"""Secrets are compared in constant time: no `==` in the code has one as an operand.

Found by name, as a reviewer would: a new secret with an ordinary name shows here, and one with a
name of its own is added to `SECRET`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = re.compile(
    r"commitment|secret|seed|passphrase|password|private|shared|signing_key|stream_key|"
    r"(^|_)(mac|esk|osk|otk|sk)(_|$)|bearer|credential"
)
# Names that hold no secret: sizes, files, and what is public.
PUBLIC = re.compile(r"_bytes$|_file$|_path$|_name$|^SEED_BYTES$|^COMMITMENT_BYTES$|^len$")
COMPARING = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)


def modules() -> list[Path]:
    rooms = (ROOT / "protocol" / "nextgpu_protocol", ROOT / "nextgpu_node")
    found = sorted(path for room in rooms for path in room.rglob("*.py"))
    # The graph room holds no keys: its seeds are those of random numbers.
    return [path for path in found if "graph" not in path.relative_to(ROOT).parts]


def names(node: ast.expr) -> Iterator[str]:
    """What an operand is called.  Neither a length nor the public half of a key is secret."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield name
        case ast.Call(func=func, args=args):
            called = list(names(func))
            yield from called
            if called[-1:] not in (["len"], ["_public"]):
                for argument in args:
                    yield from names(argument)
        case ast.Subscript(value=value):
            yield from names(value)
        case ast.BinOp(left=left, right=right):
            yield from names(left)
            yield from names(right)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            for part in parts:
                yield from names(part)


def comparisons(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each secret that is compared with an operator."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare):
            continue
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            if not isinstance(operator, COMPARING) or _is_literal(left) or _is_literal(right):
                continue
            for name in (*names(left), *names(right)):
                if SECRET.search(name) and not PUBLIC.search(name):
                    yield node.lineno, name


def _is_literal(node: ast.expr) -> bool:
    """A comparison with a constant text tells nothing of a secret."""
    return isinstance(node, ast.Constant)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_secret_is_compared_with_an_operator(path: Path) -> None:
    assert list(comparisons(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "commitment == key.commitment",
        "if self._seed != other: pass",
        "bytes(secret) == given",
        "mac[:16] == expected",
        "(a, shared) == (b, c)",
        "passphrase in known",
    ],
)
def test_the_search_finds_one_that_is_there(source: str) -> None:
    assert list(comparisons(source))


def test_the_commitment_is_compared_in_constant_time() -> None:
    sealing = (ROOT / "protocol" / "nextgpu_protocol" / "sealing.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(sealing)) if isinstance(node, ast.Call)]
    compared = [call for call in calls if ast.unparse(call.func) == "hmac.compare_digest"]
    assert any("commitment" in ast.unparse(call) for call in compared)
