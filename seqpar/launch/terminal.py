"""Rank 0's output on the terminal, and in its log.

Rank 0 writes to a pseudo-terminal if the launcher has a terminal (a Rich progress bar works as it
does without a launcher), and to a pipe if not. A thread copies what arrives to both places.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import termios
import threading
from pathlib import Path
from typing import BinaryIO

__all__ = ["Relay"]

CLOSE_POLL_S = 0.1


class Relay:
    """A path that rank 0 may open as its output; all that it writes goes to `log` and to `out`."""

    def __init__(self, log: Path, out: BinaryIO | None = None) -> None:
        self.out = sys.stdout.buffer if out is None else out
        self.log = log.open("ab", buffering=0)
        on_terminal = out is None and sys.stdout.isatty()
        self.read_end, self.write_end = os.openpty() if on_terminal else os.pipe()
        if on_terminal:
            size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self.write_end, termios.TIOCSWINSZ, size)
        self.path = os.ttyname(self.write_end) if on_terminal else f"/dev/fd/{self.write_end}"
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._copy, name="seqpar-relay", daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        while True:
            ready, _, _ = select.select([self.read_end], [], [], CLOSE_POLL_S)
            if not ready:
                if self.closing.is_set():
                    return
                continue
            try:
                data = os.read(self.read_end, 1 << 16)
            except OSError:  # a pseudo-terminal reads as an error once its last writer is gone
                return
            if not data:
                return
            with contextlib.suppress(OSError):  # the disk may be full
                self.log.write(data)
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                self.out.write(data)
                self.out.flush()

    def close(self) -> None:
        """Copy what is left and close; call when rank 0 has ended."""
        self.closing.set()
        self.thread.join()
        os.close(self.write_end)
        os.close(self.read_end)
        self.log.close()
