"""What is refused of a cost model and its file: constants missing, unknown, or no such numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from seqpar.errors import PlanError

__all__ = ["check_constants", "fields_of", "rows_of"]

LARGEST = 1e18
REALS = ("_ms", "_bytes", "_token", "gib_per_s", "overlap")
INTEGERS = ("degree", "nodes", "heads")
NAMES = ("name", "kind", "strategy")
MAY_BE_LEFT_OUT = ("heads", "max_degree", "errors")
"""Of a file: no limit, no fit. Constants may not, nor the lists that hold them."""


def check_constants(value: Any, what: str) -> None:
    """Check the constants of one dataclass by their names.

    Raises:
        PlanError: the first that is no number, not finite, negative, or not whole where it counts.
    """
    for entry in fields(value):
        found = getattr(value, entry.name)
        if found is None and entry.default is None:
            continue
        if entry.name in NAMES and not isinstance(found, str):
            raise PlanError(f"{what}: {entry.name} must be a string, got {found!r}")
        if entry.name == "errors" and not isinstance(found, Mapping):
            raise PlanError(f"{what}: errors must be an object of numbers by name, got {found!r}")
        if entry.name.endswith(REALS):
            _check_real(found, f"{what}: {entry.name}")
        elif entry.name.endswith(INTEGERS):
            _check_count(found, f"{what}: {entry.name}")


def fields_of(kind: type[Any], data: object, what: str) -> dict[str, Any]:
    """The entries of a file's object, for the dataclass `kind`.

    Raises:
        PlanError: no object, an entry that is missing, or one that is not known.
    """
    if not isinstance(data, dict):
        raise PlanError(f"a {what} must be a JSON object, got {type(data).__name__}")
    known = {entry.name: entry for entry in fields(kind)}
    for name in sorted(known.keys() - data.keys() - set(MAY_BE_LEFT_OUT)):
        default = known[name].default
        none = "[]" if default == () else "0"
        usual = "" if default is MISSING else f" ({none} if there is none)"
        raise PlanError(f"{what} lacks {name!r}: add it{usual}")
    for name in sorted(data.keys() - known.keys()):
        raise PlanError(f"{what} has an unknown entry {name!r}: it knows {sorted(known)}")
    return dict(data)


def rows_of(values: dict[str, Any], name: str) -> list[Any]:
    """The list under that name, empty if there is none.

    Raises:
        PlanError: something else than a list.
    """
    rows = values.get(name, [])
    if not isinstance(rows, list | tuple):
        raise PlanError(f"{name} must be a list of objects, got {type(rows).__name__}")
    return list(rows)


def _check_real(number: object, where: str) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise PlanError(f"{where} must be a number, got {number!r}")
    if not 0 <= number < math.inf:
        raise PlanError(f"{where} must be finite and at least 0, got {number}")
    if number > LARGEST:
        raise PlanError(f"{where} must be at most {LARGEST:g}: sums of it have to stay finite")


def _check_count(number: object, where: str) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise PlanError(f"{where} must be an integer, got {number!r}")
    if number < 1:
        raise PlanError(f"{where} must be at least 1, got {number}")
