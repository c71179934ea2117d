"""The address of a server, taken before anything slow starts."""

from __future__ import annotations

import socket

from star_attention.errors import InvalidInputError, first_line


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with the address, so that one that is taken is known before a model is read.

    Raises:
        InvalidInputError: the address is taken, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, or asyncio leaves Nagle's algorithm on: answers would wait 40 ms for the client's ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidInputError(
            f"cannot listen on {host} port {port}: {first_line(error)}; give another --port or"
            " --host"
        ) from None
    return listener
