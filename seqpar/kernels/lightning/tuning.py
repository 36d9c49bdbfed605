"""Which tile sizes the lightning kernels run with: one configuration per shape, no search.

Every line was earned by a measurement on one H200 (docs/lightning.md, "What was tried").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["Config", "configuration", "for_groups", "for_states", "padded", "with_gradient"]


@dataclass(frozen=True)
class Config:
    """Tiles of one pass. A chunk is what one loop step works on."""

    chunk: int
    """Tokens of a chunk."""
    value_tile: int
    """Columns of the state that one program carries; the key dim is never split."""
    num_warps: int
    num_stages: int
    """Chunks in flight: shared memory holds this many of each input."""
    programs_per_sm: int
    """How many programs one multiprocessor runs at a time; decides how long segments are."""
    by_hand: bool = False
    """Whether the passes written by hand for Hopper serve, for inputs with heads side by side."""


def padded(dim: int) -> int:
    """The power of two that holds a head dim; at least 64, the least height of a matrix product."""
    return max(64, 1 << (dim - 1).bit_length())


def configuration(
    key_dim: int, value_dim: int, dtype: torch.dtype, *, by_hand: bool = False
) -> Config:
    """The configuration for states of [key_dim, value_dim] and inputs of the dtype.

    `by_hand`: whether the passes written by hand run on the device.
    """
    key, value = padded(key_dim), padded(value_dim)
    if dtype == torch.float32:
        return Config(32 if max(key, value) <= 128 else 16, min(value, 32), 4, 2, 2)
    if key > 128:
        return Config(64, min(value, 64), 8, 2, 1)
    if max(key, value) > 64:
        fits = key_dim == value_dim == 128 and dtype == torch.bfloat16
        return Config(64, min(value, 128), 8, 4, 1, by_hand and fits)
    return Config(64, value, 4, 3, 2)


def with_gradient(config: Config) -> Config:
    """The configuration of a pass that also reads the tensor whose gradient it makes."""
    return replace(config, num_stages=min(config.num_stages, 3))


def for_groups(config: Config) -> Config:
    """The configuration of a pass in two groups of warps: warps of one, and room for w in both."""
    return replace(config, num_warps=4, num_stages=3)


def for_states(config: Config, *, decays_differ: bool) -> Config:
    """The configuration of the state pass.

    Where each head has a decay of its own, those whose states last read alone in the end: more
    chunks in flight make up for it. Where all read alike, memory is busy and more in flight costs.
    """
    if config.value_tile == 128 and decays_differ:
        return replace(config, num_stages=6)
    return config
