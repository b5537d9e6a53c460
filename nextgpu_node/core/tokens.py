"""The accounts of the tokens that this node has issued.  Pure; `store` keeps them on disk.
Spec: 75-tokens.md#spending

    reserve ─► held, in memory      the request is admitted
            ─► saved, on disk       before the unit starts
    settle  ─► spent                the metered time, once, against every block of the chain

A reservation that is saved and never settled counts as spent in whole: `store` does that at the
next start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.tokens import TokenChain

# Narrowing is free for a holder, an account on this node's disk is not.
MAX_BLOCKS_COUNTED = 256


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """What this node remembers of a token: never the token itself."""

    token_id: bytes  # 32 bytes
    gpu_seconds: int
    memory_bytes: int
    kinds: tuple[str, ...]
    audience: bytes  # 32 bytes, or empty for whoever holds it
    issued_at_ms: int
    expires_at_ms: int
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Reservation:
    """Time set aside for one unit.  `blocks` are the hashes of the whole chain."""

    reservation_id: bytes  # the hash of the request: one request, one reservation
    blocks: tuple[bytes, ...]
    reserved_ms: int

    @property
    def token_id(self) -> bytes:
        return self.blocks[0]


@dataclass(slots=True)
class TokenBook:
    """Every token, what was spent under each block, and what is held now."""

    issued: dict[bytes, IssuedToken] = field(default_factory=dict)
    spent_ms: dict[bytes, int] = field(default_factory=dict)
    _blocks_of: dict[bytes, set[bytes]] = field(default_factory=dict)
    _held: dict[bytes, Reservation] = field(default_factory=dict)

    def load(
        self, issued: Iterable[IssuedToken], accounts: Mapping[bytes, tuple[bytes, int]]
    ) -> None:
        """What the disk remembers; `accounts` maps a block to its token and the time spent."""
        self.issued = {token.token_id: token for token in issued}
        for block, (token_id, spent_ms) in accounts.items():
            self.spent_ms[block] = spent_ms
            self._blocks_of.setdefault(token_id, set()).add(block)

    def restore(self, saved: TokenBook) -> None:
        """Take over what another book, read from disk, holds."""
        self.issued, self.spent_ms = saved.issued, saved.spent_ms
        self._blocks_of = saved._blocks_of

    def add(self, token: IssuedToken) -> None:
        self.issued[token.token_id] = token

    def revoke(self, token_id: bytes) -> IssuedToken:
        """The token, revoked.  KeyError where there is none."""
        token = replace(self.issued[token_id], revoked=True)
        self.issued[token_id] = token
        return token

    def check_known(self, chain: TokenChain) -> None:
        """TOKEN_REVOKED for what was revoked, and for what this node has no record of."""
        token = self.issued.get(chain.token_id)
        if token is None:
            raise RemoteProtocolError(ErrorCode.TOKEN_REVOKED, "no record of it")
        if token.revoked:
            raise RemoteProtocolError(ErrorCode.TOKEN_REVOKED)

    def reserve(self, chain: TokenChain, reservation_id: bytes, max_seconds: int) -> Reservation:
        """Set `max_seconds` aside under every block; TOKEN_SPENT where one has less left."""
        wanted_ms = max_seconds * 1000
        held_ms = self._held_ms()
        for block, budget_s in chain.budgets:
            left_ms = budget_s * 1000 - self.spent_ms.get(block, 0) - held_ms.get(block, 0)
            if wanted_ms > left_ms:
                detail = f"{max_seconds} s asked, {max(0, left_ms) // 1000} s left"
                raise RemoteProtocolError(ErrorCode.TOKEN_SPENT, detail)
        self._count_blocks(chain)
        blocks = tuple(block for block, _ in chain.budgets)
        reservation = Reservation(reservation_id, blocks, wanted_ms)
        self._held[reservation_id] = reservation
        return reservation

    def release(self, reservation: Reservation) -> None:
        """No unit came of it: nothing is spent."""
        self._held.pop(reservation.reservation_id, None)

    def settle(self, reservation: Reservation, used_ms: int) -> int:
        """Spend what was used, at most what was reserved; returns it.  0 the second time."""
        if self._held.pop(reservation.reservation_id, None) is None:
            return 0
        charged_ms = min(max(0, used_ms), reservation.reserved_ms)
        for block in reservation.blocks:
            self.spent_ms[block] = self.spent_ms.get(block, 0) + charged_ms
        return charged_ms

    def held_under(self, block: bytes) -> int:
        """Milliseconds that running units hold under `block`."""
        return self._held_ms().get(block, 0)

    def _held_ms(self) -> dict[bytes, int]:
        sums: dict[bytes, int] = {}
        for reservation in self._held.values():
            for block in reservation.blocks:
                sums[block] = sums.get(block, 0) + reservation.reserved_ms
        return sums

    def _count_blocks(self, chain: TokenChain) -> None:
        counted = self._blocks_of.setdefault(chain.token_id, set())
        blocks = {block for block, _ in chain.budgets}
        if len(counted | blocks) > MAX_BLOCKS_COUNTED:
            raise RemoteProtocolError(ErrorCode.RATE_LIMITED, "this token was narrowed too often")
        counted |= blocks
