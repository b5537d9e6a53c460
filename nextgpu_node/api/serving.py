"""What every listener of the API has in common."""

from __future__ import annotations

import socket

import anycorn
import msgspec
from anycorn.config import Sockets
from starlette.responses import Response


class OpenSocket(anycorn.Config):
    """anycorn on a socket that is open already, without logs of its own.

    Left to itself anycorn would remove whatever unix socket has the name, also a living daemon's.
    """

    accesslog = None
    errorlog = None
    include_server_header = False

    def __init__(self, listener: socket.socket) -> None:
        super().__init__()
        self._listener = listener

    def create_sockets(self) -> Sockets:
        return Sockets([], [self._listener], [])


def reply(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
