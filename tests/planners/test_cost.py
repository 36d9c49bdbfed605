"""Cost models: the formula, strategies by degree, presets, JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from seqpar.errors import PlanError
from seqpar.planners import CostModel, Exchange, Link, ScatterProblem, preset
from seqpar.planners.presets import preset_names
from tests.planners.test_plan import FLEXSP, SMALL


def test_the_formula_by_hand() -> None:
    lengths = [1000, 3000]
    compute = (1e-6 * (1000**2 + 3000**2) + 0.1 * 4000) / 2
    wire = 1e6 * 4000 / 2 / (10 * 2**30) * 1e3
    assert SMALL.group_ms(lengths, 2) == pytest.approx(compute + wire + 5.0)
    assert SMALL.group_ms(lengths, 1) == pytest.approx(2 * compute + 5.0)


def test_flexsp_constants_give_the_papers_capacity() -> None:
    problem = ScatterProblem((1,), FLEXSP, preset("flexsp-7b"))
    assert problem.tokens_per_device == 6000  # (28 GiB - 7e9 · 16 bytes / 64) / 4.48 MiB
    seconds = preset("flexsp-7b").group_ms([196_608], 64) / 1e3
    assert seconds == pytest.approx(5.6, abs=0.2)


def test_the_cheapest_strategy_serves_a_group() -> None:
    ring = Exchange(strategy="ring", peer_bytes_per_token=4e5, overlap=0.5)
    model = replace(SMALL, exchanges=(*SMALL.exchanges, ring))
    ulysses, ringed = (model.group_ms([4000], 2, strategy=s) for s in ("ulysses", "ring"))
    assert ringed < ulysses
    assert model.group_ms([4000], 2) == ringed
    assert model.group_ms([4000], 4) == pytest.approx(
        min(model.group_ms([4000], 4, strategy=s) for s in ("ulysses", "ring"))
    )
    problem = ScatterProblem((4000,), replace(FLEXSP, devices=4, degrees=(2,)), model)
    assert problem.strategy_of([0], 2) == ("ring", pytest.approx(ringed))


def test_heads_limit_a_degree() -> None:
    model = replace(SMALL, exchanges=(Exchange(strategy="ulysses", bytes_per_token=1e6, heads=6),))
    problem = ScatterProblem((10,), replace(FLEXSP, devices=8, degrees=()), model)
    assert [line.degree for line in problem.degree_costs] == [1, 2]


def test_bandwidth_depends_on_placement() -> None:
    model = replace(
        SMALL,
        links=(Link(degree=8, nodes=1, gib_per_s=90.0), Link(degree=8, nodes=2, gib_per_s=9.0)),
    )
    assert model.link(4, nodes=1).gib_per_s == 90.0
    assert model.link(4, nodes=2).gib_per_s == 9.0
    assert model.link(64, nodes=8).gib_per_s == 9.0


@pytest.mark.parametrize("name", preset_names())
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(preset(name).to_json()))
    assert CostModel.load(str(path)) == preset(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fixed_ms": -1.0}, "fixed_ms must be finite and at least 0, got -1.0"),
        ({"memory_bytes_per_token": None}, "memory_bytes_per_token must be a number"),
        ({"nonsense": 1}, "unknown entry 'nonsense'"),
        ({"layers": []}, "at least one layer kind"),
        ({"links": []}, "needs links"),
        (
            {"layers": [{"kind": "softmax", "quadratic_ms": "fast"}]},
            "quadratic_ms must be a number",
        ),
        ({"exchanges": [{"strategy": "magic"}]}, "unknown strategy 'magic'"),
        ({"memory_bytes_per_token": ...}, "lacks 'memory_bytes_per_token'"),
    ],
)
def test_bad_cost_files_are_named(change: dict[str, object], match: str, tmp_path: Path) -> None:
    data = SMALL.to_json() | change
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    with pytest.raises(PlanError, match=match) as error:
        CostModel.load(str(path))
    assert "cost.json" in str(error.value)
