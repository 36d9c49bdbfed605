"""Fit a cost model to measured times: non-negative weighted least squares.

Every group measurement is one equation of the model in `cost`; each equation is divided by its
measured ms, so that the fit minimises relative errors. Where transfers were measured, bandwidth
and latency at a degree come from them; else from the group measurements at that degree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar.errors import PlanError
from seqpar.planners.cost import GIB, CostModel, Exchange, LayerCost, Link

__all__ = ["GroupMeasurement", "Transfer", "fit"]


class GroupMeasurement(NamedTuple):
    """One group's time: its degree, its documents' lengths in tokens, and measured ms."""

    degree: int
    lengths: tuple[int, ...]
    ms: float


class Transfer(NamedTuple):
    """One exchange's time: bytes that each device sent, the degree, and measured ms."""

    message_bytes: float
    degree: int
    ms: float


def fit(
    measurements: Iterable[tuple[int, Sequence[int], float]],
    transfers: Iterable[tuple[float, int, float]] = (),
    *,
    name: str = "calibrated",
    strategy: str = "ulysses",
    bytes_per_token: float = 1e6,
    memory_bytes_per_token: float = 1.0,
    memory_fixed_bytes: float = 0.0,
    devices_per_node: int | None = None,
) -> CostModel:
    """The constants that explain the measurements best, with their standard errors.

    Args:
        measurements: (degree, lengths of the documents in the group, measured ms), several
            lengths at each degree.
        transfers: (bytes each device sends, degree, ms), if exchanges were measured apart.
        strategy: the exchange that the groups ran.
        bytes_per_token: what a token puts on the wire, forward and backward, over all layers.
            Without `transfers` it is only a unit: bandwidths are fitted against it.
        memory_bytes_per_token, memory_fixed_bytes: measured memory; the default counts tokens.
        devices_per_node: tells links within a node from those across (default: all within).

    Returns:
        a model whose `errors` hold each constant's standard error, and `mean_relative` and
        `worst_relative`, the residuals as a share of the measured time.

    Raises:
        PlanError: no measurements, a time that is not over 0, or degree 1 never measured.
    """
    rows = [GroupMeasurement(d, tuple(lengths), ms) for d, lengths, ms in measurements]
    wires = [Transfer(*row) for row in transfers]
    _check(rows)
    degrees = sorted({row.degree for row in rows if row.degree > 1})
    measured = {d: _link_of(d, [w for w in wires if w.degree == d]) for d in degrees if wires}
    columns, names = _design(rows, degrees, measured, bytes_per_token)
    known = np.asarray([_known_ms(row, measured, bytes_per_token) for row in rows])
    ms = np.asarray([row.ms for row in rows])
    scaled = columns / ms[:, None]
    solution = _non_negative(scaled, (ms - known) / ms)
    values = dict(zip(names, solution.tolist(), strict=True))
    residual = np.abs(columns @ solution + known - ms) / ms
    errors = _standard_errors(scaled, (columns @ solution + known - ms) / ms, names)
    errors |= {"mean_relative": float(residual.mean()), "worst_relative": float(residual.max())}
    fitted = {
        d: (_gib_per_s(bytes_per_token, values[f"wire_{d}"]), values[f"latency_{d}"])
        for d in degrees
        if d not in measured
    }
    links = [
        Link(
            degree=degree,
            nodes=-(-degree // devices_per_node) if devices_per_node else 1,
            gib_per_s=speed,
            latency_ms=latency,
        )
        for degree, (speed, latency) in sorted((measured | fitted).items())
    ]
    return CostModel(
        name=name,
        layers=(
            LayerCost(kind="softmax", quadratic_ms=values["quadratic"]),
            LayerCost(kind="projection", linear_ms=values["linear"]),
        ),
        fixed_ms=values["fixed"],
        exchanges=(Exchange(strategy=strategy, bytes_per_token=bytes_per_token),) if links else (),
        links=tuple(links),
        memory_bytes_per_token=memory_bytes_per_token,
        memory_fixed_bytes=memory_fixed_bytes,
        errors=errors,
    )


def _gib_per_s(sent_bytes: float, ms: float) -> float:
    return sent_bytes * 1e3 / max(ms, 1e-12) / GIB


def _check(rows: Sequence[GroupMeasurement]) -> None:
    if not any(row.degree == 1 for row in rows):
        raise PlanError("a fit needs measurements at degree 1: compute is told from exchange there")
    for row in rows:
        if not row.ms > 0 or row.degree < 1 or not row.lengths or min(row.lengths) < 1:
            raise PlanError(f"not a measurement (degree >= 1, lengths >= 1, ms > 0): {row}")


def _design(
    rows: Sequence[GroupMeasurement],
    degrees: Sequence[int],
    measured: dict[int, tuple[float, float]],
    bytes_per_token: float,
) -> tuple[NDArray[np.float64], list[str]]:
    """One column a constant: quadratic, linear, fixed, then wire and latency by degree."""
    names = ["quadratic", "linear", "fixed"]
    for degree in degrees:
        if degree not in measured:
            names += [f"wire_{degree}", f"latency_{degree}"]
    columns = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        squares, tokens = sum(s * s for s in row.lengths), sum(row.lengths)
        columns[i, :3] = squares / row.degree, tokens / row.degree, 1.0
        if f"wire_{row.degree}" in names:
            at = names.index(f"wire_{row.degree}")
            columns[i, at : at + 2] = tokens / row.degree, 1.0
    return columns, names


def _known_ms(
    row: GroupMeasurement, measured: dict[int, tuple[float, float]], bytes_per_token: float
) -> float:
    """What the measured transfers say that this group spends on its exchange."""
    if row.degree not in measured:
        return 0.0
    speed, latency = measured[row.degree]
    return bytes_per_token * sum(row.lengths) / row.degree / (speed * GIB) * 1e3 + latency


def _link_of(degree: int, wires: Sequence[Transfer]) -> tuple[float, float]:
    if not wires:
        raise PlanError(f"groups of degree {degree} were measured, but no transfer at that degree")
    size = np.asarray([wire.message_bytes for wire in wires], dtype=np.float64)
    ms = np.asarray([wire.ms for wire in wires])
    columns = np.stack([size, np.ones_like(size)], axis=1)
    slope, latency = _non_negative(columns / ms[:, None], np.ones_like(ms)).tolist()
    return 1e3 / max(slope, 1e-15) / GIB, latency


def _non_negative(columns: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """min ‖columns · x - target‖ with x >= 0 (Lawson and Hanson's active set, scaled columns)."""
    scale = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    a = columns / scale
    count = a.shape[1]
    active = np.zeros(count, dtype=bool)
    x = np.zeros(count)
    for _ in range(3 * count + 10):
        gradient = a.T @ (target - a @ x)
        gradient[active] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-12:
            break
        active[best] = True
        while True:
            trial = np.zeros(count)
            trial[active] = np.linalg.lstsq(a[:, active], target, rcond=None)[0]
            if (trial[active] > 0).all():
                x = trial
                break
            falling = active & (trial <= 0)
            step = np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300))
            x = x + step * (trial - x)
            active &= x > 1e-15
            x[~active] = 0.0
    unscaled: NDArray[np.float64] = x / scale
    return unscaled


def _standard_errors(
    scaled: NDArray[np.float64], residual: NDArray[np.float64], names: Sequence[str]
) -> dict[str, float]:
    """By the residuals' variance; columns of one size, or the inverse would drop the small ones."""
    freedom = max(1, len(residual) - len(names))
    variance = float(residual @ residual) / freedom
    sizes = np.maximum(np.linalg.norm(scaled, axis=0), 1e-300)
    columns = scaled / sizes
    spread = np.sqrt(variance * np.diag(np.linalg.pinv(columns.T @ columns)).clip(0.0)) / sizes
    return dict(zip(names, spread.tolist(), strict=True))
