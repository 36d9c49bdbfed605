"""What calls of one shape share, found by one look-up: checks, cut, tiles, tables and launches.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.

Inputs are checked once for each combination of shapes, dtypes, devices and bounds: a call whose
combination is known pays for the look-up alone.
"""

from __future__ import annotations

import importlib
import logging
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.kernels.lightning.inputs import (
    Spec,
    bounds_of,
    check_decays,
    check_inputs,
)
from seqpar.kernels.lightning.segments import Segments, cut
from seqpar.kernels.lightning.tuning import Config, configuration, for_states
from seqpar.kernels.recorder import lasting
from seqpar.kernels.tensors import check_like, check_tensors

__all__ = ["Cut", "Plan", "Problem", "dense", "plan_of", "runs_by_hand"]

_log = logging.getLogger(__name__)


class Problem(NamedTuple):
    """The sizes of a call."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    decay_dims: int
    """0: no decay, 1: fixed per head, 3: per token."""
    bounds: tuple[int, ...] | None
    """Bounds of packed documents; None: every row is a sequence."""


class _Missing(Enum):
    """What a call does not take, which is not what it was given as None."""

    MISSING = 0


_MISSING = _Missing.MISSING


def plan_of(
    keys: Tensor,
    values: Tensor,
    *,
    names: tuple[str, str] = ("k", "v"),
    queries: Tensor | _Missing = _MISSING,
    output_grads: Tensor | _Missing = _MISSING,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Plan:
    """The plan of a call, after refusing what does not fit; `names` are those of keys and values.

    Raises:
        KernelInputError: what does not fit, its value, and what would.
    """
    try:
        specs = (
            _spec(keys),
            _spec(values),
            None if queries is _MISSING else _spec(queries),
            None if output_grads is _MISSING else _spec(output_grads),
            None if log_decay is None else _decay_spec(log_decay),
        )
    except (AttributeError, RuntimeError):
        given = {"q": queries, "do": output_grads, names[0]: keys, names[1]: values}
        given |= {} if log_decay is None else {"log_decay": log_decay}
        check_tensors(**{name: x for name, x in given.items() if x is not _MISSING})
        raise
    plan = _checked(names, *specs, None if cu_seqlens is None else bounds_of(cu_seqlens))
    if log_decay is not None and log_decay.is_cpu and not plan.on_triton:
        check_decays(log_decay)
    return plan


def _spec(x: Tensor) -> tuple[Any, ...]:
    """The fields of a `Spec`."""
    return x.shape, x.dtype, x.device, x.layout


def _decay_spec(log_decay: Tensor) -> tuple[Any, ...]:
    fixed_learns = log_decay.requires_grad and log_decay.ndim == 1
    return (*_spec(log_decay), fixed_learns)


@lru_cache(maxsize=1024)
def _checked(
    names: tuple[str, str],
    keys: Any,
    values: Any,
    queries: Any,
    grads: Any,
    decay: Any,
    bounds: Any,
) -> Plan:
    keys, values = Spec(*keys), Spec(*values)
    check_inputs(
        keys,
        values,
        names=names,
        queries=None if queries is None else Spec(*queries),
        output_grads=None if grads is None else Spec(*grads),
        log_decay=None if decay is None else Spec(*decay),
        bounds=bounds,
    )
    batch, tokens, heads, key_dim = keys.shape
    decay_dims = 0 if decay is None else len(decay[0])
    problem = Problem(
        batch, tokens, heads, key_dim, values.shape[3], keys.dtype, keys.device, decay_dims,
        None if bounds is None else bounds[2],
    )  # fmt: skip
    return _plan(problem)


class Cut:
    """One cut of a plan's tokens into segments, and the launches on it."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.launches: dict[Any, Any] = {}
        """By what a launch depends on: its pass, and strides of its tensors."""


class Plan:
    """Everything about calls of one shape but their tensors."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        per_16_bytes = 16 // problem.dtype.itemsize
        self.key_dim = -(-problem.key_dim // per_16_bytes) * per_16_bytes
        self.value_dim = -(-problem.value_dim // per_16_bytes) * per_16_bytes
        """Head dims as the kernels see them: rows start on 16-byte boundaries."""
        self.is_padded = (self.key_dim, self.value_dim) != problem[3:5]
        rows = [problem.tokens * (index + 1) for index in range(problem.batch)]
        self.bounds = problem.bounds or (0, *rows)
        self.num_sequences = problem.batch if problem.bounds is None else len(problem.bounds) - 1
        self.state_shape = (self.num_sequences, problem.heads, problem.key_dim, problem.value_dim)
        self._state_spec = (self.state_shape, torch.float32, problem.device, torch.strided)
        self.on_triton = problem.device.type == "cuda" and problem.dtype != torch.float64
        self.on_triton &= min(problem.batch, problem.tokens, problem.heads) > 0
        self.step_launch: Any = None
        """The launch of a decoding step."""
        self._fitting: set[tuple[int, ...]] = set()

    @cached_property
    def config(self) -> Config:
        """Tiles of passes with states [K, V]."""
        return self._configuration(self.key_dim, self.value_dim)

    @cached_property
    def transposed_config(self) -> Config:
        """Tiles of passes with states [V, K]."""
        return self._configuration(self.value_dim, self.key_dim)

    def _configuration(self, key_dim: int, value_dim: int) -> Config:
        by_hand = runs_by_hand(self.problem.device)
        return configuration(key_dim, value_dim, self.problem.dtype, by_hand=by_hand)

    @cached_property
    def state_config(self) -> Config:
        """Tiles of the state pass."""
        return for_states(self.config, decays_differ=self.problem.decay_dims == 1)

    @cached_property
    def cut(self) -> Cut:
        """The fewest segments that fill the device."""
        return Cut(self._segments())

    @cached_property
    def no_decay(self) -> Tensor:
        """[H] zeros: no decay runs as a decay of one, since its own variant crashes ptxas 12.8.

        Copied from the host, which waits: calls on any stream may use it. Calls that are trained
        through save it, also if the first call is in inference mode.
        """
        with torch.inference_mode(False):
            return lasting(torch.zeros(self.problem.heads).to(self.problem.device))

    @cached_property
    def lengths(self) -> Tensor:
        """[S]: tokens of each sequence."""
        edges = torch.tensor(self.bounds)
        return edges.diff().to(self.problem.device)

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """[B * T]: the sequence that a token belongs to."""
        return torch.arange(self.num_sequences, device=self.problem.device).repeat_interleave(
            self.lengths, output_size=self.problem.batch * self.problem.tokens
        )

    def check_state(self, name: str, state: Tensor | None) -> None:
        """Refuse an entry state or a gradient of an exit state that is not [S, H, K, V] float32;
        float64 serves too, as it does for the inputs.
        """
        if state is None:
            return
        check_tensors(**{name: state})
        if _spec(state) != self._state_spec:
            dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
            check_like(name, state, self.state_shape, dtype, self.problem.device)

    def _segments(self) -> Segments:
        lanes = self.problem.heads * -(-self.value_dim // self.config.value_tile)
        slots = _num_sms(self.problem.device) * self.config.programs_per_sm
        device = str(self.problem.device)
        return cut(self.bounds, lanes, slots, self.config.chunk, device)

    def aligned(self, x: Tensor) -> Tensor:
        """x [B, T, H, D] as bulk copies want it, copied only if it is not: last dim contiguous,
        rows evenly apart and on 16-byte boundaries; odd head dims padded.
        """
        if self.is_padded and x.shape[3] % (16 // x.element_size()):
            _warn_padded(x.shape[3], x.dtype)
            x = functional.pad(x, (0, -x.shape[3] % (16 // x.element_size())))
        if x.data_ptr() % 16 == 0 and (x.stride() in self._fitting or self._fits(x)):
            return x
        return x.clone(memory_format=torch.contiguous_format)

    def _fits(self, x: Tensor) -> bool:
        per_16_bytes = 16 // x.element_size()
        batch, tokens, heads, _ = x.shape
        row, head, one = x.stride()[1:]
        fits = (
            one == 1
            and (heads == 1 or head % per_16_bytes == 0)
            and row % per_16_bytes == 0
            and (batch == 1 or x.stride(0) == tokens * row)
            and min(x.stride()) > 0
        )
        if fits:
            self._fitting.add(x.stride())
        return fits

    def decay(self, log_decay: Tensor | None) -> Tensor:
        """Log decays as the kernels take them: float32, contiguous, aligned."""
        return self.no_decay if log_decay is None else dense(log_decay, torch.float32)

    def state(self, state: Tensor | None) -> Tensor | None:
        """A state [S, H, K, V] as the kernels take it: float32, contiguous, aligned, padded."""
        if state is None:
            return None
        if self.is_padded:
            pad = (0, self.value_dim - state.shape[3], 0, self.key_dim - state.shape[2])
            state = functional.pad(state.detach(), pad)
        return dense(state, torch.float32)

    def trimmed(self, x: Tensor, *dims: int) -> Tensor:
        """x without the padding of its last dims."""
        if not self.is_padded:
            return x
        for offset, dim in enumerate(dims):
            x = x.narrow(x.ndim - len(dims) + offset, 0, dim)
        return x.contiguous()

    def new_state(self) -> Tensor:
        """[S, H, K, V] float32, to be written."""
        shape = (self.num_sequences, self.problem.heads, self.key_dim, self.value_dim)
        return torch.empty(shape, dtype=torch.float32, device=self.problem.device)


_plan = lru_cache(maxsize=256)(Plan)


def dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x contiguous, at an address that is a multiple of 16 bytes, in `dtype` if one is given."""
    if dtype is not None and x.dtype != dtype:
        x = x.detach().to(dtype)
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.detach().clone(memory_format=torch.contiguous_format)


def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 4 where the interpreter stands in for one."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def runs_by_hand(device: torch.device) -> bool:
    """Whether the passes written by hand run there: on Hopper, if Triton has what they use."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        for name in ("output_pass_groups", "output_pass_sums"):
            importlib.import_module(f"seqpar.kernels.lightning.{name}")
    except (ImportError, AttributeError) as reason:
        _log.warning("lightning passes run in Triton, which is slower: %s", reason)
        return False
    return True


@lru_cache(maxsize=64)
def _warn_padded(dim: int, dtype: torch.dtype) -> None:
    _log.warning("head dim %d in %s is not a multiple of 16 bytes: tensors are copied", dim, dtype)
