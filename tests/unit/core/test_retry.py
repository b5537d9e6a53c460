"""One table from errors to remedies, over every code that a peer can give."""

from __future__ import annotations

import pytest

from nextgpu_node.core.retry import Remedy, is_lasting, pause_s, remedy_for
from nextgpu_node.errors import DaemonUnreachable, NextGPUError, PeerLost, UsageError
from nextgpu_node.sdk.outcome import error_for, status_error
from nextgpu_protocol.errors import ErrorCode

_TOKEN = {code.name for code in ErrorCode if "TOKEN" in code.name}
_REMEDIES = {
    Remedy.WAIT: {"BUSY", "RATE_LIMITED", "INTERNAL", "EXPIRED"},
    Remedy.ELSEWHERE: {
        *(
            "NOT_SHARING",
            "NOT_ALLOWED",
            "PYTHON_NOT_ALLOWED",
            "OVER_LIMIT",
            "NO_SUCH_DEVICE",
            "OLD_TABLE",
        ),
        *("SHUTTING_DOWN", "NOT_YET_VALID", "OUT_OF_MEMORY", "TIMED_OUT", "WORKER_CRASHED"),
        *_TOKEN,
        *("SUBMITTER_LOST", "PEER_UNREACHABLE", "TRUNCATED", "OWNER_RETURNED"),
        # What a peer says that was asked to go on with a unit and no longer has it.
        *("UNKNOWN_UNIT", "WRONG_OFFSET"),
    },
    Remedy.GIVE_UP: {"BAD_PROGRAM", "UNKNOWN_OPERATOR", "BAD_TENSORS", "STEP_FAILED", "CANCELLED"},
    Remedy.DISTRUST: {
        *("MALFORMED", "NOT_CANONICAL", "TOO_LARGE", "UNEXPECTED_MESSAGE", "BAD_SIGNATURE"),
        *("WRONG_PEER", "REPLAYED", "UNKNOWN_SUITE", "WRONG_OFFER", "BAD_SEAL"),
    },
}


@pytest.mark.parametrize("code", ErrorCode, ids=lambda code: code.name)
def test_every_code_of_the_wire_has_its_remedy(code: ErrorCode) -> None:
    expected = [remedy for remedy, names in _REMEDIES.items() if code.name in names]
    assert [remedy_for(error_for(code, ""))] == expected


def test_an_owner_who_comes_back_and_a_killed_provider_send_the_work_elsewhere() -> None:
    assert remedy_for(status_error("owner_stopped")) is Remedy.ELSEWHERE
    assert remedy_for(PeerLost()) is Remedy.ELSEWHERE


@pytest.mark.parametrize("error", [UsageError(), ValueError(), NextGPUError()])
def test_what_is_not_a_peers_doing_is_not_tried_again(error: Exception) -> None:
    assert remedy_for(error) is Remedy.GIVE_UP


def test_our_own_daemon_is_no_peers_fault() -> None:
    assert remedy_for(DaemonUnreachable()) is Remedy.LOCAL


def test_only_lasting_refusals_are_lasting() -> None:
    lasting = {code.name for code in ErrorCode if is_lasting(error_for(code, ""))}
    expected = {"NOT_ALLOWED", "OVER_LIMIT", "NO_SUCH_DEVICE", "OLD_TABLE", "NOT_YET_VALID"}
    assert lasting == expected | {"PYTHON_NOT_ALLOWED"} | _TOKEN


def test_pauses_grow_are_spread_and_end_at_half_a_minute() -> None:
    longest = [pause_s(failures, jitter=0.999) for failures in range(40)]
    assert longest == sorted(longest)
    assert 29 < longest[-1] <= 30
    assert pause_s(3, jitter=0) == pytest.approx(pause_s(3, jitter=0.9999) / 2, rel=1e-3)
