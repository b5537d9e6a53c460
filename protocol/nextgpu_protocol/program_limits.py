"""Bounds of the program format.  Spec: 60-program.md#limits

Each is checked before the memory that it bounds is taken.  A 6-layer sentence encoder has some
160 nodes and 10 KB; training steps of large models reach tens of thousands of nodes.
"""

from __future__ import annotations

MAX_PROGRAM_BYTES = 4 * 1024 * 1024
# Depth of the msgpack arrays: program, graphs, graph, nodes, node, args, list, items, reference.
MAX_PROGRAM_DEPTH = 12
# An empty array is one byte on the wire and 64 in memory.
MAX_PROGRAM_ARRAYS = 1_048_576

MAX_NODES = 65_536
MAX_VALUES = 262_144
MAX_NODE_OUTPUTS = 4_096
MAX_NODE_ARGUMENTS = 64
MAX_LIST_ITEMS = 4_096
# A list may hold lists; those hold none.
MAX_LIST_NESTING = 2

MAX_TENSORS = 16_384
MAX_SYMBOLS = 256
MAX_RANK = 16
MAX_DIMENSION = 2**40
MAX_TENSOR_BYTES = 2**44
MAX_NAME_BYTES = 256
MAX_OPERATOR_BYTES = 96
MAX_CHECKPOINT_S = 7 * 24 * 3600

# One safetensors image: the JSON header may not be longer than this.
MAX_TENSOR_HEADER_BYTES = 8 * 1024 * 1024

# The operator table that this version of the protocol names (60-program.md#operators).  Here and
# not beside the table, because a daemon must name it without loading torch.
TABLE_VERSION = 2
