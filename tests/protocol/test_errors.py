"""The table of wire codes."""

from __future__ import annotations

import pytest

from nextgpu_protocol.errors import SENTENCES, ErrorCode, ProtocolError, RemoteProtocolError


def test_every_code_has_its_own_sentence() -> None:
    assert set(SENTENCES) == set(ErrorCode)
    assert len(set(SENTENCES.values())) == len(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_a_remote_error_reads_as_its_sentence(code: ErrorCode) -> None:
    assert str(RemoteProtocolError(code)) == SENTENCES[code]
    error = RemoteProtocolError(code, "Offer.price")
    assert str(error) == f"{SENTENCES[code]} (Offer.price)"
    assert isinstance(error, ProtocolError)
