"""Cost models: the formula, strategies by degree, presets, JSON, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from seqpar.errors import PlanError
from seqpar.planners import CostModel, Exchange, Link, ScatterProblem, preset
from seqpar.planners.presets import preset_names
from tests.planners.test_plan import FLEXSP, SMALL

LAYER = {"kind": "softmax", "quadratic_ms": 1e-6, "linear_ms": 0.0}
EXCHANGE = asdict(SMALL.exchanges[0])
LINK = asdict(SMALL.links[0])


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
        ({"fixed_ms": math.nan}, "fixed_ms must be finite and at least 0, got nan"),
        ({"fixed_ms": 10**400}, "fixed_ms must be at most 1e"),
        ({"memory_bytes_per_token": None}, "memory_bytes_per_token must be a number"),
        ({"nonsense": 1}, "unknown entry 'nonsense'"),
        ({"name": 5}, "name must be a string"),
        ({"errors": 5}, "errors must be an object"),
        ({"layers": []}, "at least one layer kind"),
        ({"layers": {"kind": "softmax"}}, "layers must be a list"),
        ({"links": []}, "needs links"),
        ({"layers": [LAYER | {"quadratic_ms": "fast"}]}, "quadratic_ms must be a number"),
        ({"layers": [LAYER | {"linear_ms": -1e-9}]}, "linear_ms must be finite and at least 0"),
        ({"layers": [LAYER | {"quadratic_ms": 0}], "fixed_ms": 0}, "a token must take time"),
        ({"exchanges": [EXCHANGE | {"strategy": "magic"}]}, "unknown strategy 'magic'"),
        ({"exchanges": [EXCHANGE | {"heads": 0}]}, "heads must be at least 1"),
        ({"exchanges": [EXCHANGE | {"max_degree": 2.5}]}, "max_degree must be an integer"),
        ({"exchanges": [EXCHANGE | {"overlap": 1.5}]}, "overlap is a share of 1"),
        ({"links": [LINK | {"degree": 2.5}]}, "degree must be an integer"),
        ({"links": [LINK | {"gib_per_s": 0}]}, "gib_per_s > 0"),
    ],
)
def test_bad_cost_files_are_named(change: dict[str, object], match: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(SMALL.to_json() | change))
    with pytest.raises(PlanError, match=match) as error:
        CostModel.load(str(path))
    assert "cost.json" in str(error.value)


@pytest.mark.parametrize(
    ("part", "name"),
    [("", "fixed_ms"), ("", "memory_bytes_per_token"), ("", "memory_sharded_bytes")]
    + [("", "layers"), ("", "exchanges"), ("", "links")]
    + [("layers", name) for name in LAYER]
    + [("exchanges", name) for name in EXCHANGE if name not in ("heads", "max_degree")]
    + [("links", name) for name in LINK],
)
def test_a_cost_file_holds_every_constant(part: str, name: str) -> None:
    data = json.loads(json.dumps(SMALL.to_json()))
    del (data[part][0] if part else data)[name]
    with pytest.raises(PlanError, match=f"lacks '{name}': add it"):
        CostModel.from_json(data)


def test_a_file_without_end_is_no_cost_file(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text("[" * 100_000)
    with pytest.raises(PlanError, match=r"cost\.json is not JSON"):
        CostModel.load(str(path))
