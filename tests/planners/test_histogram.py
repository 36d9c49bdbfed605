"""Histograms sample what they count; forecasts and simulations add up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from seqpar.errors import PlanError
from seqpar.planners import Cluster, Planner, preset
from seqpar.planners.forecast import Estimate, forecast
from seqpar.planners.histogram import LengthHistogram
from seqpar.planners.plot import plot_plan, plot_simulation
from seqpar.planners.simulate import batches_of, simulate
from seqpar.planners.sizing import devices_for
from tests.planners.test_plan import FLEXSP, SMALL, flexsp_problem

SHORT = LengthHistogram((1, 100, 1000, 10_000), (60, 30, 10))
QUICK = Planner(time_limit_ms=5, bound="none")


def test_samples_follow_the_counts() -> None:
    drawn = SHORT.sample(20_000, seed=1)
    for low, high, share in ((1, 100, 0.6), (100, 1000, 0.3), (1000, 10_000, 0.1)):
        assert sum(low <= s < high for s in drawn) / 20_000 == pytest.approx(share, abs=0.02)
    assert drawn == SHORT.sample(20_000, seed=1)
    assert drawn[:50] != SHORT.sample(50, seed=2)
    assert max(SHORT.sample(2000, seed=1, max_tokens=500)) <= 500


def test_a_histogram_of_lengths_counts_each_once() -> None:
    lengths = [1, 1, 3, 700, 1024, 65_536]
    histogram = LengthHistogram.of(lengths)
    assert sum(histogram.counts) == len(lengths)
    for length in lengths:
        assert any(
            count and low <= length < high
            for low, high, count in zip(
                histogram.edges_tokens, histogram.edges_tokens[1:], histogram.counts, strict=False
            )
        )


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"edges_tokens": [1, 2], "counts": []},
        {"edges_tokens": [2, 1], "counts": [1]},
        {"edges_tokens": [1, math.inf], "counts": [1]},
        {"edges_tokens": [1, 9], "counts": [math.nan]},
        {"edges_tokens": [1, 9, 90], "counts": [0.25, 1.75]},
        {"edges_tokens": [1, 9.5, 90], "counts": [1, 1]},
        {"edges_tokens": "19", "counts": [1]},
        [],
    ],
)
def test_bad_histograms_are_named(data: object, tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"h\.json"):
        LengthHistogram.load(str(path))


@pytest.mark.parametrize("tokens", [1, 50, 99, 100, 500, 5000, 9_998])
def test_the_share_of_longer_documents_is_that_of_samples(tokens: int) -> None:
    drawn = SHORT.sample(20_000, seed=1)
    assert SHORT.share_over(tokens) == pytest.approx(
        sum(length > tokens for length in drawn) / 20_000, abs=0.015
    )
    assert SHORT.share_over(9_999) == 0.0
    assert LengthHistogram((0, 1, 3), (1, 1)).share_over(1) == pytest.approx(0.5 * math.log(1.5, 3))


def test_intervals_are_students() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.plus_minus == pytest.approx(3.1824 * math.sqrt(5 / 3) / 2, rel=0.01)
    assert Estimate.of([7.0]).plus_minus == math.inf


def test_a_forecast_adds_up() -> None:
    cluster = Cluster(devices=4, memory_bytes=16384.0)
    found = forecast(SHORT, cluster, SMALL, sequences=40, batches=5, planner=QUICK)
    assert sum(found.degree_share.values()) == pytest.approx(1)
    assert found.longest_tokens == 65_536
    assert 0 <= found.memory_headroom.mean < 1
    assert 0 <= found.idle_share.mean < 0.5
    assert all(speedup.mean >= 1 - 1e-9 for speedup in found.speedup.values())
    plans = found.plans
    assert found.step_ms.mean == pytest.approx(sum(p.makespan_ms for p in plans) / 5)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.left_out_share == 0.0
    shorter = forecast(
        SHORT, cluster, SMALL, sequences=40, batches=1, context_tokens=999, planner=QUICK
    )
    assert shorter.left_out_share == pytest.approx(0.1)


def test_devices_for_a_document_and_for_a_rate() -> None:
    node = Cluster(devices=8, devices_per_node=8, memory_bytes=FLEXSP.memory_bytes)
    devices, _ = devices_for(
        SHORT,
        node,
        preset("flexsp-7b"),
        document_tokens=100_000,
        sequences=64,
        batches=1,
        planner=QUICK,
    )
    assert devices == 32  # 16 devices hold 16 · (28 GiB - 7 GiB) / 4.48 MiB = 76,800 tokens
    with pytest.raises(PlanError, match="4096 devices reach"):
        devices_for(
            SHORT, node, SMALL, tokens_per_second=1e12, sequences=8, batches=1, planner=QUICK
        )


def test_simulation_and_plots(tmp_path: Path) -> None:
    result = simulate(
        batches_of([3000, 200, 9000, 70], batches=3),
        Cluster(devices=4, memory_bytes=16384.0),
        SMALL,
        devices=[2, 4],
        noise=0.2,
        planner=Planner(time_limit_ms=5),
    )
    assert [row.devices for row in result.rows] == [2, 4]
    for row in result.rows:
        assert row.noisy_step_ms is not None
        assert row.noisy_step_ms.mean > row.forecast.step_ms.mean  # a step waits for its slowest
    plot_simulation(result, str(tmp_path / "simulation.png"))
    problem = flexsp_problem(0, count=64)
    plot_plan(Planner(time_limit_ms=5).plan(problem), problem, str(tmp_path / "plan.svg"))
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plan.svg").read_text().count("<path") > 64
    with pytest.raises(PlanError, match="cannot write the plot"):
        plot_simulation(result, str(tmp_path / "no" / "where.png"))


@pytest.mark.parametrize(("devices", "noise"), [([], 0.0), ([0], 0.0), ([5000], 0.0), ([4], -1.0)])
def test_bad_simulations(devices: list[int], noise: float) -> None:
    with pytest.raises(PlanError):
        simulate(batches_of([5], batches=1), FLEXSP, SMALL, devices=devices, noise=noise)


@pytest.mark.parametrize("sequences", [0.0, -8.0, math.nan])
def test_a_batch_without_sequences_is_refused(sequences: float) -> None:
    batches = batches_of([5], batches=1)
    with pytest.raises(PlanError, match="sequences_per_device must be over 0"):
        simulate(batches, FLEXSP, SMALL, devices=[4], sequences_per_device=sequences)
