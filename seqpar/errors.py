"""Every exception that a caller of seqpar may catch.

    SeqparError
    ├── LayoutError            a stream, its documents or a rank's tensors do not fit together
    ├── MeshError              ranks, degrees and groups do not fit together
    ├── KernelInputError       shapes, dtypes or devices that a kernel cannot take
    ├── UnsupportedModelError  a module that cannot be made exact under sequence parallelism
    ├── ParityError            a wrapped model and one device disagree
    ├── PlanError              lengths, costs or clusters that cannot be planned with
    │   └── InfeasiblePlanError    a valid problem that no plan can satisfy
    ├── DataError              documents or data positions that cannot be used
    ├── JobSpecError           a job file that cannot be run as written
    ├── LaunchError            a job that could not be started, or ended badly
    │   └── RankFailedError        a rank died: which one, and how
    ├── CheckpointError        a checkpoint that is missing, torn or of another job
    └── MissingExtraError      an optional dependency is not installed

A message says what was wrong, the limit, the value found, and what to change. Errors of value or
type also derive from `ValueError`, `TypeError` or `ImportError`, so that generic handlers work.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CheckpointError",
    "DataError",
    "InfeasiblePlanError",
    "JobSpecError",
    "KernelInputError",
    "LaunchError",
    "LayoutError",
    "MeshError",
    "MissingExtraError",
    "ParityError",
    "PlanError",
    "RankFailedError",
    "SeqparError",
    "UnsupportedModelError",
]


class SeqparError(Exception):
    """Base of every error that seqpar raises on purpose; it survives a trip between processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[SeqparError], args: tuple[Any, ...], state: dict[str, Any]) -> SeqparError:
    """Unpickle without calling __init__, whose arguments are not `args`."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class LayoutError(SeqparError, ValueError):
    """A stream, its documents, its spans or a rank's tensors do not fit together."""


class MeshError(SeqparError, ValueError):
    """Ranks, degrees and process groups do not fit together."""


class KernelInputError(SeqparError, ValueError):
    """Shapes, dtypes or devices that a kernel cannot take; raised before any launch."""


class UnsupportedModelError(SeqparError, TypeError):
    """A module that cannot be made exact under sequence parallelism: its name and the reason."""

    def __init__(self, module: str, reason: str, remedy: str) -> None:
        super().__init__(f"cannot parallelize {module}: {reason}; {remedy}")
        self.module = module
        self.reason = reason
        self.remedy = remedy


class ParityError(SeqparError):
    """A wrapped model and one device disagree by more than the tolerance."""


class PlanError(SeqparError, ValueError):
    """Lengths, costs or clusters that cannot be planned with."""


class InfeasiblePlanError(PlanError):
    """No plan satisfies the problem: how many tokens were needed and how many fit."""

    def __init__(self, message: str, *, needed_tokens: int, available_tokens: int) -> None:
        super().__init__(message)
        self.needed_tokens = needed_tokens
        self.available_tokens = available_tokens


class DataError(SeqparError, ValueError):
    """Documents or data positions that cannot be used."""


class JobSpecError(SeqparError, ValueError):
    """A job file that cannot be run as written."""


class LaunchError(SeqparError, RuntimeError):
    """A job could not be started, or ended badly."""


class RankFailedError(LaunchError):
    """A rank died, and the job was stopped because of it."""

    def __init__(self, message: str, *, global_rank: int, exit_code: int) -> None:
        super().__init__(message)
        self.global_rank = global_rank
        self.exit_code = exit_code


class CheckpointError(SeqparError, RuntimeError):
    """A checkpoint is missing, torn, or belongs to another job."""


class MissingExtraError(SeqparError, ImportError):
    """An optional dependency is not installed: which one, and the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'seqpar[{extra}]'"
        )
        self.package = package
        self.extra = extra
