"""Where the fuzzer starts: the vectors, and streams that an honest worker would send."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import torch

from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.messages import Refusal
from nextgpu_protocol.records import Piece, RecordKind, RecordWriter, UnitSummary
from tests.fuzz import program_seeds
from tests.fuzz.codec import CODEC_TYPES, SIGNED_TYPES, WAY
from tests.fuzz.stream import END, FINAL, SEAL
from tests.protocol.vectors import TYPES, Vector, load_vectors


def seeds(name: str) -> list[bytes]:
    """Inputs for the target of that name; none for a target without any."""
    makers: dict[str, Callable[[], Iterator[bytes]]] = {
        "codec": _codec,
        "framing": _framing,
        "stream": _stream,
        "program": program_seeds.programs,
        "plan": program_seeds.programs,
        "run": program_seeds.programs,
        "tensors": program_seeds.images,
    }
    maker = makers.get(name)
    return list(maker()) if maker else []


def _codec() -> Iterator[bytes]:
    for vector in load_vectors():
        if vector.kind in ("message", "envelope"):
            yield bytes([_way(vector)]) + vector.input


def _way(vector: Vector) -> int:
    cls = TYPES[vector.params["type"]]
    if vector.kind == "envelope":
        return WAY + SIGNED_TYPES.index(cls)
    return CODEC_TYPES.index(cls)


def _framing() -> Iterator[bytes]:
    for vector in load_vectors():
        if vector.kind == "frame":
            yield b"\x02" + vector.input
        elif vector.kind == "session":
            steps = json.loads(json.dumps(vector.decoded))["steps"]
            kinds = vector.input[1::2]
            ours = [kind for kind, step in zip(kinds, steps, strict=True) if step[0] == "S"]
            yield b"\x00" + b"".join(bytes([0, 0, 0, 1, kind]) for kind in ours)


def _stream() -> Iterator[bytes]:
    image = list(encode_tensors({"y": torch.ones(2)}))
    done = [encode_message(UnitSummary(1, 0, 0, False))]
    failed = [encode_message(Refusal(40, "no"))]
    started = (RecordKind.STARTED, [b""])
    result = (RecordKind.RESULT, image)
    checkpoint = (RecordKind.CHECKPOINT, [bytes(8), *encode_tensors({})])
    for words in (
        [started, result, (RecordKind.DONE, done)],
        [started, (RecordKind.FAILED, failed)],
        [started, result, checkpoint, (RecordKind.FINAL, list(encode_tensors({})))],
    ):
        yield _steps(words)


def _steps(words: Sequence[tuple[RecordKind, Sequence[Piece]]]) -> bytes:
    """Preamble, one chunk for each record without its padding, FINAL, END."""
    made = [_step(SEAL, b"")]
    for kind, pieces in words:
        writer = RecordWriter()
        chunks = [*writer.write(kind, pieces), *writer.flush()]
        made.append(_step(SEAL, b"".join(chunks).rstrip(b"\0") or b"\0"))
    return b"".join(made) + _step(FINAL, b"") + _step(END, b"")


def _step(step: int, body: bytes) -> bytes:
    return bytes([step]) + len(body).to_bytes(2) + body
