"""`nextgpud` as somebody might modify it: its workers give wrong results."""

from __future__ import annotations

import sys

from nextgpu_node.daemon.main import main
from nextgpu_node.sandbox.launcher import Launcher

assert Launcher.__init__.__kwdefaults__ is not None
Launcher.__init__.__kwdefaults__["worker_module"] = "tests.support.lying_worker"

if __name__ == "__main__":
    sys.exit(main())
