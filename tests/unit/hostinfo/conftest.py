from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from nextgpu_node.hostinfo import devices
from tests.unit.hostinfo.fake_nvml import Card, FakeNvml


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    """Puts a machine's cards in NVML's place."""

    def install_cards(*cards: Card | None, loaded: bool = True) -> FakeNvml:
        fake = FakeNvml(list(cards), loaded=loaded)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(devices, "_nvml_started", False)
        monkeypatch.setattr(devices, "_cached", None)
        return fake

    return install_cards
