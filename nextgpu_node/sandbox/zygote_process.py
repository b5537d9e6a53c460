"""How a zygote process is started: by the launcher for work, by the probe to try the layers."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Final

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
