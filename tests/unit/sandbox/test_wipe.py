from __future__ import annotations

import os
import signal
import subprocess

from nextgpu_node.sandbox import wipe


def test_process_is_gone_only_once_it_was_reaped() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        pidfd = os.pidfd_open(process.pid)
        assert not wipe.is_gone(pidfd)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not wipe.is_gone(pidfd), "a zombie still holds its process id"
        process.wait()
        assert wipe.is_gone(pidfd)
        os.close(pidfd)


def test_members_of_a_session_are_found() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        assert wipe.session_members(process.pid) == [process.pid]
        process.kill()
    assert wipe.session_members(process.pid) == []


def test_report_is_complete_only_if_every_step_held() -> None:
    held = wipe.WipeReport(True, True, True, "yes", (("a", True), ("b", True)))
    failed = wipe.WipeReport(True, True, True, "yes", (("a", True), ("b", False)))
    assert held.complete
    assert not failed.complete


def test_host_without_swap_says_so() -> None:
    assert wipe.swap_is_off() in ("yes", "no", "unknown")
