"""The solver's view of a problem: sequences from the longest down, weights by degree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from seqpar.planners.cost import DegreeCost
from seqpar.planners.problem import ScatterProblem

__all__ = ["SortedBatch"]


@dataclass(frozen=True)
class SortedBatch:
    """Sequences of one problem, longest first (ties by index), and their cost at each degree.

    `order[k]` is the problem's index of the k-th longest sequence. `weights[d][k]` is its ms at
    the d-th degree line, fixed terms apart. `smallest[k]` is the first degree line that holds it.
    """

    order: tuple[int, ...]
    tokens: tuple[int, ...]
    degree_lines: tuple[DegreeCost, ...]
    devices: int

    @classmethod
    def of(cls, problem: ScatterProblem) -> SortedBatch:
        """Sort the problem's sequences."""
        lengths = problem.lengths
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        return cls(
            tuple(order),
            tuple(lengths[index] for index in order),
            problem.degree_costs,
            problem.cluster.devices,
        )

    def subset(self, members: Sequence[int]) -> SortedBatch:
        """Some of the sequences (rising positions here) as a batch of their own."""
        return replace(
            self,
            order=tuple(self.order[k] for k in members),
            tokens=tuple(self.tokens[k] for k in members),
        )

    @cached_property
    def token_array(self) -> NDArray[np.float64]:
        """float64 [K]: `tokens`."""
        return np.asarray(self.tokens, dtype=np.float64)

    @cached_property
    def weight_array(self) -> NDArray[np.float64]:
        """float64 [D, K]: `weights`."""
        s = self.token_array
        return np.stack([line.quadratic * s * s + line.linear * s for line in self.degree_lines])

    @cached_property
    def weights(self) -> list[list[float]]:
        """`weight_array` as lists, for scalar loops."""
        rows: list[list[float]] = self.weight_array.tolist()
        return rows

    @cached_property
    def smallest(self) -> list[int]:
        """[K]: the first degree line whose group holds the sequence."""
        capacities = np.asarray([line.capacity for line in self.degree_lines])
        found: list[int] = np.searchsorted(capacities, self.token_array, side="left").tolist()
        return found

    @cached_property
    def degree_array(self) -> NDArray[np.float64]:
        """float64 [D]: devices of each degree line."""
        return np.asarray([line.degree for line in self.degree_lines], dtype=np.float64)

    @cached_property
    def fixed_array(self) -> NDArray[np.float64]:
        """float64 [D]: fixed ms of each degree line."""
        return np.asarray([line.fixed for line in self.degree_lines], dtype=np.float64)

    def least(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[K]: the least of each column of [D, K] over the degree lines that hold the sequence."""
        holds = np.arange(len(self.degree_lines))[:, None] >= np.asarray(self.smallest)[None, :]
        least: NDArray[np.float64] = np.where(holds, values, np.inf).min(axis=0)
        return least

    @property
    def least_micro_batches(self) -> int:
        """How many micro-batches memory asks for at least."""
        return -(-sum(self.tokens) // (self.devices * self.device_token_capacity))

    @property
    def device_token_capacity(self) -> int:
        """Tokens that one device holds."""
        line = self.degree_lines[0]
        return line.capacity // line.degree
