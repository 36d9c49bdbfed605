"""What a `Worker`'s process does: answer requests on its standard input until that ends."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from typing import IO

from seqpar.planners.worker import send


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer (function, arguments) with (is it an error, result or error) until the input ends."""
    while True:
        try:
            function, args = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = False, function(*args)
        except Exception as error:
            answer = True, error
        send(answers, answer)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not mix with the answers
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
