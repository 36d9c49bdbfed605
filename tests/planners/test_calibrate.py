"""A fit recovers the constants that made the times, and says how far off it is."""

from __future__ import annotations

import numpy as np
import pytest

from seqpar.errors import PlanError
from seqpar.planners.calibrate import fit
from tests.planners.test_plan import SMALL


def rows(noise: float = 0.0) -> list[tuple[int, tuple[int, ...], float]]:
    rng = np.random.default_rng(0)
    made = []
    for degree in (1, 2, 4):
        for length in (64, 512, 4096, 16384):
            for count in (1, 4):
                lengths = (length,) * count
                ms = SMALL.group_ms(lengths, degree) * (1 + noise * rng.standard_normal())
                made.append((degree, lengths, ms))
    return made


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_fit_recovers_the_model(noise: float) -> None:
    model = fit(rows(noise), memory_bytes_per_token=1.0)
    for degree in (1, 2, 4):
        for lengths in ([100], [8000, 300], [30000]):
            expected = SMALL.group_ms(lengths, degree)
            assert model.group_ms(lengths, degree) == pytest.approx(expected, rel=3 * noise + 1e-6)
    assert model.errors["mean_relative"] == pytest.approx(noise * 0.8, rel=0.5, abs=1e-9)
    assert (model.errors["linear"] > 1e-6) == (noise > 0)


def test_standard_errors_are_how_far_repeated_fits_scatter() -> None:
    """Of a small model on an H200: constants of very different sizes."""
    shapes = ((509,) * 32, (131_072,), (509,) * 128, (65_536, *(509,) * 64), (30_000,))

    def ms(lengths: tuple[int, ...]) -> float:
        return 4.5e-9 * sum(s * s for s in lengths) + 6e-5 * sum(lengths) + 20

    rng = np.random.default_rng(0)
    fits = [
        fit([(1, shape, ms(shape) * (1 + 0.01 * rng.standard_normal())) for shape in shapes])
        for _ in range(100)
    ]
    found = {
        "quadratic": [model.layers[0].quadratic_ms for model in fits],
        "linear": [model.layers[1].linear_ms for model in fits],
        "fixed": [model.fixed_ms for model in fits],
    }
    for name, values in found.items():
        said = np.mean([model.errors[name] for model in fits])
        assert 0.6 * said < np.std(values) < 1.6 * said, name


def test_measured_transfers_set_bandwidth_and_latency() -> None:
    wires = [
        (n * 1e6, d, n * 1e6 / (s * 2**30) * 1e3 + 0.5)
        for d, s in ((2, 10), (4, 8))
        for n in (1, 9)
    ]
    model = fit(rows(), wires, bytes_per_token=1e6)
    assert [link.gib_per_s for link in model.links] == pytest.approx([10, 8])
    assert [link.latency_ms for link in model.links] == pytest.approx([0.5, 0.5])


def test_fit_needs_degree_one() -> None:
    with pytest.raises(PlanError, match="degree 1"):
        fit([(2, (5,), 1.0)])
