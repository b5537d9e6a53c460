"""The results of a shard as tensors by name, as a file, and as a hash.

One step gives its tensors as they are; several are stacked along a new leading axis, or, where
sizes vary from step to step, called NAME.0, NAME.1, …
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nextgpu_node.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]

_KEY: Final = "nextgpu.key"
_HASH_BYTES: Final = 32
_READ_BYTES: Final = 1024 * 1024
_LONGEST_HEADER: Final = 16 * 1024 * 1024


def together(steps: Sequence[Tensors], *, stack: bool) -> dict[str, Tensor]:
    """The results of all steps as one set of tensors; `stack` also where there is one step."""
    import torch

    if not stack and len(steps) == 1:
        return dict(steps[0])
    joined: dict[str, Tensor] = {}
    for name in steps[0] if steps else ():
        tensors = [step[name] for step in steps]
        if len({tensor.shape for tensor in tensors}) == 1:
            joined[name] = torch.stack(tensors)
        else:
            # Sizes that vary from step to step have no common axis.
            joined |= {f"{name}.{index}": tensor for index, tensor in enumerate(tensors)}
    return joined


def tensors_digest(tensors: Tensors) -> str:
    """BLAKE2b-256 of names, dtypes, shapes and bytes, in hex: equal where every bit is."""
    from nextgpu_node.graph.tensors import encode_tensors

    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for piece in encode_tensors({name: tensors[name] for name in sorted(tensors)}):
        digest.update(piece)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE2b-256 of a file's bytes, in hex.  Raises OSError."""
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def shard_key(program: str, source: str, how: str) -> str:
    """What a result depends on, as one hash: program, input, and how that is cut into steps."""
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    digest.update(json.dumps([program, source, how]).encode())
    return digest.hexdigest()


def result_image(tensors: Tensors, key: str) -> Iterator[bytes]:
    """The pieces of a safetensors file of `tensors` that carries `key` in its metadata."""
    from safetensors.torch import save

    plain: dict[str, Any] = {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
    }
    yield save(plain, metadata={_KEY: key})


def key_of_file(path: Path) -> str:
    """The key in a result file; empty where it is some other file.  Raises OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= _LONGEST_HEADER else b""
    try:
        metadata = json.loads(header).get("__metadata__", {})
        return str(metadata.get(_KEY, ""))
    # Text that is no JSON or no UTF-8 is a ValueError; JSON that is no object has no `get`.
    except (ValueError, AttributeError, RecursionError):
        return ""


def read_result(path: Path) -> dict[str, Tensor]:
    """The tensors of a result file.  Raises UsageError, which names the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as exc:
        raise UsageError(f"{path}: is no result that can be read ({exc}).") from exc
