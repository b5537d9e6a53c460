"""Every bound of the wire protocol, in one place.  Spec: limits.md

Sizes in bytes, times in milliseconds unless the name says otherwise.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# One sealed chunk carries at most this much plaintext.  secretstream reaches its full speed from
# 64 KiB on, and a daemon that relays holds a handful of chunks per unit: 256 KiB serves both.
CHUNK_PLAINTEXT_BYTES: Final = 256 * KIB
CHUNK_OVERHEAD_BYTES: Final = 17  # crypto_secretstream_xchacha20poly1305_ABYTES

# One message.  A real offer has about 400 bytes, one with every text and list far beyond use 5 KB.
MAX_MESSAGE_BYTES: Final = 8 * KIB
MAX_FRAME_BYTES: Final = CHUNK_PLAINTEXT_BYTES + 4 * KIB

MAX_TEXT_BYTES: Final = 256  # any text field of a message
MAX_LIST_ITEMS: Final = 64  # any list field of a message

# Clocks of volunteers' machines drift; five minutes is what Kerberos (RFC 4120) allows too.
MAX_CLOCK_SKEW_MS: Final = 5 * 60 * 1000
MAX_REQUEST_LIFETIME_MS: Final = 10 * 60 * 1000
MAX_OFFER_LIFETIME_MS: Final = 60 * 1000
MAX_CAPACITY_LIFETIME_MS: Final = 5 * 60 * 1000
MAX_RESUME_LIFETIME_MS: Final = 60 * 1000

# Announcements outlive three missed turns of a provider that repeats them every ten minutes.
MAX_ANNOUNCEMENT_LIFETIME_MS: Final = 30 * 60 * 1000
MAX_ANNOUNCEMENT_BYTES: Final = 1 * KIB  # as an envelope; one with four addresses has about 400
MAX_ADDRESSES: Final = 4
MAX_ADDRESS_BYTES: Final = 128

# Sealed streams are padded to Padmé sizes with this floor, so that small prompts look alike.
PADDING_FLOOR_BYTES: Final = 4 * KIB

MAX_MANIFEST_BYTES: Final = 4 * KIB

# What a side keeps of the frames that it sent last, for a connection that breaks.  More than can be
# on its way: a stream's window (4 MiB here), and what its reader holds.
RESUME_BYTES: Final = 8 * MIB
# A ticket opens a lane at once or never.
LANE_TICKET_BYTES: Final = 32
MAX_LANE_TICKET_MS: Final = 30 * 1000
# How long a unit waits for its submitter to come back.
RESUME_GRACE_MS: Final = 30 * 1000

# A unit's clear-text limits; an owner's own limits are usually far below.
MAX_STREAM_BYTES: Final = 64 * GIB
MAX_UNIT_SECONDS: Final = 24 * 3600
MAX_MEMORY_BYTES: Final = 1024 * GIB

# A capability token travels inside a request, which is one message.
MAX_TOKEN_BYTES: Final = 4 * KIB
MAX_TOKEN_BLOCKS: Final = 8
MAX_TOKEN_GPU_SECONDS: Final = 10**9  # 31 years of one device

# All succession statements of one node together fit into one message.
MAX_SUCCESSIONS: Final = 8
