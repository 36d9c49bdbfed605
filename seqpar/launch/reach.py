"""Whether something listens at an address, told before anything waits for it."""

from __future__ import annotations

import socket

from seqpar.errors import LaunchError

__all__ = ["check_answers"]

CONNECT_TIMEOUT_S = 3.0


def check_answers(host: str, port: int) -> None:
    """Raise a LaunchError at once where nothing listens, before Ray's minute of patience."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise LaunchError(
            f"nothing answers at {host}:{port} ({reason}): is the cluster up, and is this its "
            "address? `ray start --head` prints it"
        ) from None
