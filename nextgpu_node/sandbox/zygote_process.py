"""How a zygote is come by: started by the launcher for work or by the probe to try the layers, or
had from systemd, which starts one for each connection to the worker service's socket."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Final

# systemd/nextgpu-worker.socket: one connection, one service instance, one worker.
SERVICE_SOCKET: Final = "/run/nextgpu-worker.sock"
# What a zygote's fork may be instead of a worker for a unit, by the word for it in a spawn request.
TASK_MODULES: Final = {
    "probe": "nextgpu_node.sandbox.probe_worker",
    "card": "nextgpu_node.worker.card",
}

ENVIRONMENT: Final = {
    # numpy's import would start threads, and a fork needs a process with one.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A child can not use CUDA that its parent has initialised: torch must only ask NVML.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def start_zygote(worker_module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process and our end of its control socket (control.py).

    It is bound to the life of the calling thread (PR_SET_PDEATHSIG, prctl(2)), so trio's own
    subprocess functions, which start processes from helper threads, would not do.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-m", "nextgpu_node.sandbox.zygote"),
                *("--worker-module", worker_module, "--control-fd", str(theirs.fileno())),
            ],
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return process, ours


def connect_to_service() -> socket.socket:
    """Our end of the control socket of a fresh worker service.  Raises OSError where systemd does
    not listen, or this process may not connect."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.connect(SERVICE_SOCKET)
    except OSError:
        channel.close()
        raise
    return channel
