"""Tokens of this node: issued, listed, revoked.  What they cost is `core.tokens`', on disk it is
`store`'s; this joins the two and the key that signs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import trio

from nextgpu_node.api_types import InviteReply, InviteRequest, InviteView
from nextgpu_node.clock import now_ms
from nextgpu_node.core.tokens import IssuedToken, TokenBook
from nextgpu_node.errors import UsageError
from nextgpu_node.identity import Identity
from nextgpu_node.store.token_ledger import TokenLedger
from nextgpu_protocol.errors import LocalProtocolError
from nextgpu_protocol.ids import peer_id_from_public_key, public_key_from_peer_id
from nextgpu_protocol.messages import SUITE, TokenBlock
from nextgpu_protocol.tokens import (
    PROGRAM_KIND,
    format_token,
    issue_token,
    open_chain_untrusted,
)

_LEAST_ID_CHARS = 6


class Tokens:
    """`open` it before the node lends; `book` is what admission reads and writes."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.ledger = TokenLedger(path)
        self.book = TokenBook()
        self._identity = identity

    def open(self) -> None:
        """Raises StoreError where the record can not be used."""
        self.book.restore(self.ledger.open(now_ms=now_ms()))

    def close(self) -> None:
        self.ledger.close()

    async def issue(self, wanted: InviteRequest) -> InviteReply:
        """A new token.  Its text is in the reply and nowhere else."""
        issued_at_ms = now_ms()
        allows = TokenBlock(
            suite=SUITE,
            previous_hash=b"",
            next_key=bytes(32),
            gpu_seconds=wanted.gpu_seconds,
            memory_bytes=wanted.memory_bytes,
            kinds=tuple(sorted(set(wanted.kinds))) or (PROGRAM_KIND,),
            audience=_key_of(wanted.audience),
            expires_at_ms=issued_at_ms + wanted.expires_s * 1000,
        )
        try:
            held = issue_token(allows, self._identity.signing_key, os.urandom(32))
        except LocalProtocolError as exc:
            raise UsageError(f"Such a token can not be issued: {exc}.") from exc
        token = _remembered(open_chain_untrusted(held.blocks).token_id, allows, issued_at_ms)
        # On disk first: a token that this node does not remember is worth nothing.
        await trio.to_thread.run_sync(self.ledger.add, token)
        self.book.add(token)
        return InviteReply(invite=self._view(token), token=format_token(held))

    def views(self) -> list[InviteView]:
        """Every token that is remembered, newest first."""
        tokens = sorted(self.book.issued.values(), key=lambda token: -token.issued_at_ms)
        return [self._view(token) for token in tokens]

    async def revoke(self, id_text: str, end_units: Callable[[bytes], None]) -> InviteView:
        """Revoke the token with that id, or the one whose id begins with it."""
        token_id = self._find(id_text)
        token = self.book.revoke(token_id)
        end_units(token_id)
        await trio.to_thread.run_sync(self.ledger.revoke, token_id)
        return self._view(token)

    def _find(self, id_text: str) -> bytes:
        found = [t for t in self.book.issued if t.hex().startswith(id_text.lower())]
        if len(id_text) < _LEAST_ID_CHARS or len(found) != 1:
            which = "more than one token" if len(found) > 1 else "no token of this node"
            raise UsageError(
                f"{which} has an id that begins so; `nextgpu invites` lists them. "
                f"Give at least {_LEAST_ID_CHARS} characters."
            )
        return found[0]

    def _view(self, token: IssuedToken) -> InviteView:
        return InviteView(
            id=token.token_id.hex(),
            gpu_seconds=token.gpu_seconds,
            spent_s=self.book.spent_ms.get(token.token_id, 0) / 1000,
            reserved_s=self.book.held_under(token.token_id) / 1000,
            memory_bytes=token.memory_bytes,
            kinds=list(token.kinds),
            audience=peer_id_from_public_key(token.audience) if token.audience else "",
            issued_at_ms=token.issued_at_ms,
            expires_at_ms=token.expires_at_ms,
            revoked=token.revoked,
        )


def _remembered(token_id: bytes, allows: TokenBlock, issued_at_ms: int) -> IssuedToken:
    return IssuedToken(
        token_id=token_id,
        gpu_seconds=allows.gpu_seconds,
        memory_bytes=allows.memory_bytes,
        kinds=allows.kinds,
        audience=allows.audience,
        issued_at_ms=issued_at_ms,
        expires_at_ms=allows.expires_at_ms,
    )


def _key_of(peer_id: str) -> bytes:
    if not peer_id:
        return b""
    try:
        return public_key_from_peer_id(peer_id)
    except ValueError as exc:
        raise UsageError(f"The audience is no peer ID: {exc}.") from exc
