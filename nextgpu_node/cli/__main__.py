"""`python -m nextgpu_node.cli`: the same as `nextgpu`."""

import sys

from nextgpu_node.cli.main import main

sys.exit(main())
