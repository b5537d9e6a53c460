"""The node's own errors.  The docstring of each class is the sentence a user reads.

Foreign exceptions become one of these at the edge that imports the library.  Errors of the
protocol live in `nextgpu_protocol.errors`.  Exit codes are those of the README's table.
"""

from __future__ import annotations


class NextGPUError(Exception):
    """Something went wrong in NextGPU."""

    exit_code = 1
    # The wire's code (nextgpu_protocol.errors.ErrorCode) where a peer gave one.
    code: int | None = None

    def __str__(self) -> str:
        return super().__str__() or (type(self).__doc__ or "").strip()


class UsageError(NextGPUError):
    """The command was called in a way that it does not understand."""

    exit_code = 2


class ConfigError(NextGPUError):
    """The configuration is not valid."""

    exit_code = 2


class IdentityError(NextGPUError):
    """The node's identity key can not be used."""

    exit_code = 2


class StoreError(NextGPUError):
    """The node's own records can not be read or written."""


class DaemonUnreachable(NextGPUError):
    """No nextgpud answers here. Start it with `nextgpu up`."""

    exit_code = 3


class NoPeerFound(NextGPUError):
    """No peer on the network offers what this job needs right now."""

    exit_code = 4


class Refused(NextGPUError):
    """The peer refused the work unit."""

    exit_code = 5


class SandboxError(NextGPUError):
    """The sandbox could not be built, so nothing was run."""

    exit_code = 5


class JobTimeout(NextGPUError):
    """The work unit ran past its time limit."""

    exit_code = 6


class IntegrityError(NextGPUError):
    """A signature, a seal or a receipt did not verify. Nothing from it was used."""

    exit_code = 7


class JobFailed(NextGPUError):
    """The work unit failed on the peer."""


class PeerLost(NextGPUError):
    """The connection to the peer ended before the results were complete."""


class ConnectionLost(PeerLost):
    """The connection to the peer broke, which neither side wanted."""


class OwnerReturned(PeerLost):
    """The owner of the peer took the device back. Run it again elsewhere."""


class OutOfMemory(JobFailed):
    """The work unit needed more memory than its limit."""


class JobStoreError(NextGPUError):
    """A job's directory can not be read or written. Nothing that was in it is lost."""


class JobCancelled(NextGPUError):
    """The job was cancelled."""

    exit_code = 130


class JobInterrupted(NextGPUError):
    """The process that worked at the job was told to end. `nextgpu retry` goes on with it."""

    exit_code = 130


class NetworkError(NextGPUError):
    """The peer-to-peer network can not be used."""


class ProgramError(NextGPUError):
    """The model can not be turned into a program."""

    exit_code = 2
