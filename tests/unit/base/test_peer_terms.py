from __future__ import annotations

import pytest

from nextgpu_node.peer_terms import PeerTerms, make_terms, parse_terms
from nextgpu_protocol.ids import peer_id_from_public_key

PEER = peer_id_from_public_key(bytes(range(32)))


def test_terms_are_read_and_written_alike() -> None:
    text = f"{PEER} units=1 seconds_per_day=3600 requests_per_minute=10 kinds=program,python"
    terms = parse_terms(text)
    assert terms == PeerTerms(PEER, 1, 3600, 10, ("program", "python"))
    assert str(terms) == text
    assert make_terms(PEER, terms.as_mapping()) == terms


def test_what_is_not_named_is_as_for_everyone() -> None:
    assert parse_terms(PEER) == PeerTerms(PEER)


@pytest.mark.parametrize(
    "text",
    [
        "somebody units=1",
        f"{PEER} units",
        f"{PEER} units=0",
        f"{PEER} units=-1",
        f"{PEER} units=65",
        f"{PEER} units=\N{ARABIC-INDIC DIGIT ONE}",
        f"{PEER} gpus=1",
        f"{PEER} kinds=program,shell",
        f"{PEER} kinds=",
        f"{PEER} peer_id=x",
        "",
    ],
)
def test_what_is_no_term_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_terms(text)
