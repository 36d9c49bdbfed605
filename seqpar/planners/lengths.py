"""Read sequence lengths from a file: text with one length a line, a JSON list, or .npy."""

from __future__ import annotations

import json
import os

import numpy as np

from seqpar.errors import PlanError

__all__ = ["read_lengths"]

SHOWN = 40
"""Characters of an entry that an error quotes."""


def read_lengths(path: str) -> tuple[int, ...]:
    """The lengths in a file, in its order.

    Raises:
        PlanError: the file cannot be read or is empty, or an entry is not an integer of at
            least 1: its line (text) or index (JSON, .npy).
    """
    try:
        if os.path.splitext(path)[1] == ".npy":
            values, what = np.load(path, allow_pickle=False).reshape(-1).tolist(), "entry"
        else:
            with open(path, encoding="utf-8-sig") as file:
                values, what = _parse(file.read(), path)
    except PlanError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"cannot read lengths from {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"cannot read lengths from {path}: {error}") from error
    lengths = []
    for position, value in values if what == "line" else enumerate(values):
        lengths.append(_length(value, f"{path}, {what} {position}"))
    if not lengths:
        raise PlanError(f"{path} has no lengths: one integer a line, a JSON list, or .npy")
    return tuple(lengths)


def _parse(text: str, path: str) -> tuple[list[object], str]:
    if text.lstrip()[:1] in ("[", "{"):
        data = json.loads(text)
        if not isinstance(data, list):
            raise PlanError(f"{path} must hold a JSON list of lengths, got an object")
        return list(data), "entry"
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()], "line"


def _length(value: object, where: str) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        length = int(value)
        if not isinstance(value, str) and length != value:
            raise ValueError
    except (ValueError, OverflowError):  # of NaN, of infinity
        said = repr(value)[:SHOWN]
        raise PlanError(f"{where}: {said} is not a length (an integer of at least 1)") from None
    if length < 1:
        raise PlanError(f"{where}: {value} is below 1 token; leave it out")
    return length
