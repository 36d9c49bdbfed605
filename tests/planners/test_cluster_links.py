"""Measured transfers become the planner's links, and a cost file keeps the rest."""

from __future__ import annotations

import json

import pytest

from seqpar.errors import PlanError
from seqpar.planners.cluster_links import links_of, write_links
from seqpar.planners.cost import GIB, CostModel, LayerCost, Link


def test_bandwidth_and_latency_are_the_line_through_both_messages():
    small, large = links_of([(1 << 20, 4, 3.0), (1 << 12, 2, 1.5), (GIB, 2, 501.5), (GIB, 4, 9e3)])
    assert (small.degree, small.nodes) == (2, 2)
    assert small.gib_per_s == pytest.approx(2.0, rel=1e-4)
    assert small.latency_ms == pytest.approx(1.5, rel=1e-2)
    assert (large.degree, large.nodes) == (4, 4)


def test_a_small_message_that_took_longer_leaves_a_link_that_plans_can_use():
    (link,) = links_of([(1 << 12, 2, 9.0), (GIB, 2, 4.0)])
    assert link.gib_per_s == pytest.approx(250.0)
    assert link.latency_ms == pytest.approx(9.0, rel=1e-3)


def test_links_of_the_same_place_are_replaced_and_the_rest_of_the_file_stays(tmp_path):
    links = (Link(degree=2, gib_per_s=9.0), Link(degree=2, nodes=2, gib_per_s=1.0))
    layers = (LayerCost(kind="all", linear_ms=1.0),)
    model = CostModel(name="a", layers=layers, links=links, memory_bytes_per_token=1.0)
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(model.to_json()))
    write_links(str(path), [Link(degree=2, nodes=2, gib_per_s=5.0), Link(degree=4, gib_per_s=7.0)])
    found = CostModel.load(str(path))
    rates = [(link.degree, link.nodes, link.gib_per_s) for link in found.links]
    assert rates == [(2, 1, 9.0), (2, 2, 5.0), (4, 1, 7.0)]
    assert found.layers == layers


def test_a_file_that_is_no_cost_file_is_refused(tmp_path):
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(PlanError, match=r"cost\.json"):
        write_links(str(tmp_path / "cost.json"), [])
