"""Counting what collectives move: `with count_traffic() as traffic:`.

The counter is a context variable. Autograd runs the backward of CUDA tensors on threads of its
own, so a Function that communicates takes `current_traffic()` in forward and enters
`count_into(...)` in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = [
    "Operation",
    "Traffic",
    "count",
    "count_into",
    "count_traffic",
    "current_traffic",
    "report_saved",
]


@dataclass
class Operation:
    """What one kind of operation moved on this rank. Bytes are payload, own copies left out."""

    calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    saved_bytes: int = 0
    """What need not be received because it had decayed away."""


@dataclass
class Traffic:
    """Calls and bytes of this rank by operation name; an operation never used counts nothing."""

    operations: dict[str, Operation] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Operation:
        return self.operations.get(name, Operation())

    @property
    def calls(self) -> int:
        return sum(op.calls for op in self.operations.values())

    @property
    def sent_bytes(self) -> int:
        return sum(op.sent_bytes for op in self.operations.values())

    @property
    def received_bytes(self) -> int:
        return sum(op.received_bytes for op in self.operations.values())

    @property
    def saved_bytes(self) -> int:
        return sum(op.saved_bytes for op in self.operations.values())

    def add(self, name: str, *, sent_bytes: int, received_bytes: int) -> None:
        """Count one call."""
        operation = self.operations.setdefault(name, Operation())
        operation.calls += 1
        operation.sent_bytes += sent_bytes
        operation.received_bytes += received_bytes

    def merge(self, other: Traffic) -> None:
        """Count what another counter has counted."""
        for name, found in other.operations.items():
            operation = self.operations.setdefault(name, Operation())
            operation.calls += found.calls
            operation.sent_bytes += found.sent_bytes
            operation.received_bytes += found.received_bytes
            operation.saved_bytes += found.saved_bytes


_TRAFFIC: ContextVar[Traffic | None] = ContextVar("seqpar_traffic", default=None)


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends and receives inside the block, backward passes included.

    Counters nest: what the inner block counts, the outer one does not.
    """
    with count_into(Traffic()) as traffic:
        assert traffic is not None
        yield traffic


@contextmanager
def count_into(traffic: Traffic | None) -> Iterator[Traffic | None]:
    """Count into a counter that exists already (None: do not count)."""
    token = _TRAFFIC.set(traffic)
    try:
        yield traffic
    finally:
        _TRAFFIC.reset(token)


def current_traffic() -> Traffic | None:
    """The counter in force, to hand to another thread."""
    return _TRAFFIC.get()


def count(name: str, sent_bytes: int, received_bytes: int) -> None:
    """Count one call in the counter in force."""
    traffic = _TRAFFIC.get()
    if traffic is not None:
        traffic.add(name, sent_bytes=sent_bytes, received_bytes=received_bytes)


def report_saved(name: str, saved_bytes: int) -> None:
    """Count bytes that an exchange need not receive on this rank; no call is made."""
    traffic = _TRAFFIC.get()
    if traffic is not None:
        traffic.operations.setdefault(name, Operation()).saved_bytes += saved_bytes
