"""The address that a server listens on."""

from __future__ import annotations

import socket

from flowrl.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at `host`:`port`, to listen on. Raises UserError where none can be had: it is
    taken, is no address of this machine, or needs rights.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    # A port is not taken by connections that an earlier server has left.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"port={port} on host={host}: {reason}; choose another port, where port=0 takes a free "
            "one, and for the host an address of this machine"
        ) from error
    return listening
