"""Correct a cost model by the times that its own plans took.

Each constant is multiplied by a factor: one for the quadratic terms, one for the linear, one for
the fixed, and one for the exchange at each degree. The factors minimise

    Σ ((corrected - measured) / max(predicted, measured))²  +  PRIOR · Σ (factor - 1)²

so a few observations move the constants a little, many move them to what was measured, and a
constant that no observation touches stays as it was. An observation that is far off while the
others agree (a page fault, a first run that compiles) counts less the farther it is off: its
residual enters linearly beyond OUTLYING times the typical one (Huber 1964, by reweighting).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpar.errors import PlanError
from seqpar.planners.cost import CostModel

__all__ = ["Observation", "corrected", "prediction_error"]

PRIOR = 0.05
"""Weight of staying as it was: about that of PRIOR observations of one constant alone."""

SMALLEST, LARGEST = 0.1, 10.0

OUTLYING, ROUNDS, LEAST_TYPICAL = 2.0, 8, 0.01

Observation = tuple[int, Sequence[int], float]
"""A group that ran: its degree, its documents' lengths, and measured ms."""


def prediction_error(cost: CostModel, observations: Iterable[Observation]) -> float:
    """Mean of |predicted - measured| / measured over the observations.

    Raises:
        PlanError: no observations, or a measured time that is not over 0.
    """
    rows = _checked(observations)
    errors = [abs(cost.group_ms(lengths, d) - ms) / ms for d, lengths, ms in rows]
    return float(np.mean(errors))


def corrected(cost: CostModel, observations: Iterable[Observation]) -> CostModel:
    """The cost model with its constants corrected by measured group times.

    Its `errors` say how far predictions were off on average before and after
    (`observed_relative_before`, `observed_relative_after`) and how many groups were observed.

    Raises:
        PlanError: no observations, or a measured time that is not over 0.
    """
    rows = _checked(observations)
    degrees = sorted({degree for degree, _, _ in rows if degree > 1})
    names = ["quadratic", "linear", "fixed", *(f"exchange_{degree}" for degree in degrees)]
    terms = np.zeros((len(rows), len(names)))
    for i, (degree, lengths, _) in enumerate(rows):
        terms[i, :3] = _compute_terms(cost, lengths, degree)
        if degree > 1:
            rest = cost.group_ms(lengths, degree) - terms[i, :3].sum()
            terms[i, names.index(f"exchange_{degree}")] = max(0.0, rest)
    ms = np.asarray([row[2] for row in rows])
    scales = np.maximum(ms, terms.sum(axis=1))
    factors = _factors(terms / scales[:, None], ms / scales)
    scale = dict(zip(names, np.clip(factors, SMALLEST, LARGEST).tolist(), strict=True))
    better = _scaled(cost, scale)
    errors = {
        "observed_relative_before": prediction_error(cost, rows),
        "observed_relative_after": prediction_error(better, rows),
        "observations": float(len(rows)),
    }
    return replace(better, errors={**cost.errors, **errors})


def _factors(shares: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """What to multiply each constant by, so that `shares` [rows, constants] add up to `target`."""
    weights: NDArray[Any] = np.ones(len(shares))
    factors: NDArray[Any] = np.ones(shares.shape[1])
    for _ in range(ROUNDS):
        weighted = shares * weights[:, None]
        normal = weighted.T @ shares + PRIOR * np.eye(len(factors))
        factors = np.linalg.solve(normal, weighted.T @ target + PRIOR)
        off = np.abs(shares @ factors - target)
        limit = OUTLYING * max(float(np.median(off)), LEAST_TYPICAL)
        weights = np.minimum(1.0, limit / np.maximum(off, 1e-12))
    return factors


def _compute_terms(cost: CostModel, lengths: Sequence[int], degree: int) -> tuple[float, ...]:
    squares, tokens = sum(s * s for s in lengths), sum(lengths)
    quadratic = sum(layer.quadratic_ms for layer in cost.layers) * squares / degree
    linear = sum(layer.linear_ms for layer in cost.layers) * tokens / degree
    return quadratic, linear, cost.fixed_ms


def _scaled(cost: CostModel, scale: dict[str, float]) -> CostModel:
    layers = tuple(
        replace(
            layer,
            quadratic_ms=layer.quadratic_ms * scale["quadratic"],
            linear_ms=layer.linear_ms * scale["linear"],
        )
        for layer in cost.layers
    )
    links = tuple(
        replace(
            link,
            gib_per_s=link.gib_per_s / scale.get(f"exchange_{link.degree}", 1.0),
            latency_ms=link.latency_ms * scale.get(f"exchange_{link.degree}", 1.0),
        )
        for link in cost.links
    )
    return replace(cost, layers=layers, links=links, fixed_ms=cost.fixed_ms * scale["fixed"])


def _checked(observations: Iterable[Observation]) -> list[tuple[int, tuple[int, ...], float]]:
    rows = [(degree, tuple(lengths), float(ms)) for degree, lengths, ms in observations]
    if not rows:
        raise PlanError("there are no observations to correct by")
    for row in rows:
        if not row[2] > 0 or not row[1]:
            raise PlanError(f"an observation has lengths and a time over 0 ms, got {row}")
    return rows
