"""Settings of [sharing] as the local API shows and changes them."""

from __future__ import annotations

from nextgpu_node.api_types import LimitView
from nextgpu_node.config import SETTINGS, SharingConfig, shown
from nextgpu_node.errors import UsageError
from nextgpu_node.peer_terms import make_terms, parse_terms
from nextgpu_protocol.ids import public_key_from_peer_id

# Who is served and whether at all have commands of their own.
_ELSEWHERE = ("enabled", "allow", "deny", "peers", "python_allow")


def limit_views(config: SharingConfig) -> list[LimitView]:
    """Every limit with its value, in the order of the documentation."""
    return [
        LimitView(
            key=setting.key,
            value=shown(dotted, getattr(config, setting.attribute)),
            expected=setting.rule.expected,
        )
        for dotted, setting in SETTINGS.items()
        if setting.section == "sharing" and setting.key not in _ELSEWHERE
    ]


def serving_changes(
    config: SharingConfig, peer_id: str, rule: str, terms: dict[str, str]
) -> dict[str, str]:
    """The settings, as text, under which `rule` and `terms` hold for one peer.

    Raises UsageError where they can not hold.
    """
    try:
        public_key_from_peer_id(peer_id)
    except ValueError as exc:
        raise UsageError(f"That is not a peer ID: {exc}.") from exc
    try:
        own = [str(make_terms(peer_id, terms))] if terms and rule != "deny" else []
    except ValueError as exc:
        raise UsageError(
            f"{exc} can not hold. Terms are units (1 to 64), seconds_per_day, requests_per_minute "
            "and kinds (program, python)."
        ) from exc
    others = [text for text in config.peers if parse_terms(text).peer_id != peer_id]
    return {
        "sharing.allow": ",".join(_with(config.allow, peer_id, wanted=rule == "allow")),
        "sharing.deny": ",".join(_with(config.deny, peer_id, wanted=rule == "deny")),
        "sharing.peers": ";".join([*others, *own]),
    }


def _with(peers: tuple[str, ...], peer_id: str, *, wanted: bool) -> list[str]:
    rest = [peer for peer in peers if peer != peer_id]
    return [*rest, peer_id] if wanted else rest
