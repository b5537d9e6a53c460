"""What every command is given: where the node's files are, and how to speak to the user."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter

from nextgpu_node.cli.output import Output
from nextgpu_node.paths import Paths, find_paths


@dataclass(frozen=True, slots=True)
class Context:
    """The global options, resolved.  `home` and `config_file` are as given, for handing on."""

    paths: Paths
    home: Path | None
    config_file: Path | None
    environ: Mapping[str, str]
    out: Output

    @classmethod
    def from_options(
        cls, environ: Mapping[str, str], home: Path | None, config_file: Path | None, out: Output
    ) -> Context:
        """Raises ConfigError where the home directory can not hold a socket."""
        paths = find_paths(environ, home=home)
        if home is None and not environ.get("NEXTGPU_HOME"):
            paths = _of_running_service(paths)
        if config_file is not None:
            paths = dataclasses.replace(paths, config_file=config_file.expanduser().absolute())
        return cls(paths, home, config_file, environ, out)


def _of_running_service(paths: Paths) -> Paths:
    """Root's own node is the machine's service, where that runs and no other of root's does."""
    service = Paths.of_system_service()
    runs = os.geteuid() == 0 and service.api_socket.exists() and not paths.api_socket.exists()
    return service if runs else paths


# A parameter of a command that the command line never fills.
Ctx: TypeAlias = Annotated[Context, Parameter(parse=False)]
