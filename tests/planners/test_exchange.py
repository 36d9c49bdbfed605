"""The exchange model: limits that must hold, and the choices it makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from seqpar.errors import PlanError
from seqpar.planners.exchange import (
    INFINIBAND_NDR,
    NVLINK_H200,
    PEERS_H200,
    ExchangeProblem,
    choose_exchange,
    exchange_ms,
)
from seqpar.planners.exchange_plot import main, plot_exchanges

MIB = 2**20
PROBLEM = ExchangeProblem(
    world_size=8, reach=7, state_bytes=2 * MIB, tokens=8192, token_bytes=32768, heads=32
)


def test_measured_all_gathers_of_two_h200s_are_met() -> None:
    """2 to 256 MiB a rank, NCCL 2.28.9."""
    for mib, measured_us in ((2, 31), (16, 114), (32, 162), (256, 1069)):
        problem = replace(PROBLEM, world_size=2, reach=1, state_bytes=mib * MIB)
        estimate = exchange_ms("all_gather", problem, NVLINK_H200) * 1e3
        assert estimate == pytest.approx(measured_us, rel=0.25)


def test_time_grows_with_ranks_as_each_exchange_does() -> None:
    small, large = (
        replace(PROBLEM, world_size=65, reach=64),
        replace(PROBLEM, world_size=129, reach=128),
    )
    growth = {
        name: exchange_ms(name, large, INFINIBAND_NDR) / exchange_ms(name, small, INFINIBAND_NDR)
        for name in ("all_gather", "chain", "pipelined_chain", "log_step")
    }
    assert growth["chain"] == pytest.approx(2.0)
    assert 1.8 < growth["all_gather"] < 2.0
    assert growth["log_step"] == pytest.approx(8 / 7)


def test_decay_cuts_every_exchange_to_one_hop() -> None:
    for name in ("all_gather", "chain", "pipelined_chain", "log_step"):
        near = exchange_ms(name, replace(PROBLEM, far_share=0.0), NVLINK_H200)
        one_hop = exchange_ms("chain", replace(PROBLEM, reach=1), NVLINK_H200)
        assert near == pytest.approx(one_hop)
        assert near < exchange_ms(name, PROBLEM, NVLINK_H200)


def test_memory_of_peers_is_read_where_a_state_is_wanted() -> None:
    far = exchange_ms("all_gather", PROBLEM, PEERS_H200)
    near = exchange_ms("all_gather", replace(PROBLEM, far_share=0.0), PEERS_H200)
    some = exchange_ms("all_gather", replace(PROBLEM, reach=3, far_share=0.5), PEERS_H200)
    state = PEERS_H200.transfer_ms(2 * MIB)
    assert (far - near, some - near) == (pytest.approx(6 * state), pytest.approx(2 * state))
    for share in (0.0, 0.5, 1.0):
        choice = choose_exchange(replace(PROBLEM, far_share=share), PEERS_H200)
        assert choice.exchange == "all_gather"


def test_choices_follow_what_is_cheap() -> None:
    assert choose_exchange(PROBLEM, NVLINK_H200).exchange == "all_gather"
    big = replace(PROBLEM, world_size=512, reach=511, state_bytes=64 * MIB)
    assert choose_exchange(replace(big, heads_apart=False), INFINIBAND_NDR).exchange == "log_step"
    few_tokens = replace(big, tokens=16)
    assert choose_exchange(few_tokens, INFINIBAND_NDR).exchange == "all_to_all"
    alone = replace(PROBLEM, world_size=1, reach=0)
    assert set(choose_exchange(alone, NVLINK_H200).estimates_ms.values()) == {0.0}


def test_documents_that_never_cross_cost_nothing() -> None:
    choice = choose_exchange(replace(PROBLEM, reach=0), NVLINK_H200)
    assert choice.exchange == "all_gather"
    assert choice.estimates_ms["all_gather"] == 0.0


def test_bad_problems_are_refused() -> None:
    with pytest.raises(PlanError, match="far_share"):
        replace(PROBLEM, far_share=1.5)
    with pytest.raises(PlanError, match="at least 1"):
        replace(PROBLEM, world_size=0)
    with pytest.raises(PlanError, match="no exchange 'pigeon'"):
        exchange_ms("pigeon", PROBLEM, NVLINK_H200)


def test_the_plot_shows_measured_points(tmp_path: Path) -> None:
    measured = tmp_path / "state.json"
    row = {"state_bytes": 2 * MIB, "all_gather": 0.05, "chain": 0.07}
    measured.write_text(json.dumps({"exchange_ms": [row]}))
    plain, dotted = tmp_path / "plain.svg", tmp_path / "dotted.svg"
    plot_exchanges(plain)
    main([str(dotted), "--measured", str(measured)])
    assert dotted.read_text().count("<use ") == plain.read_text().count("<use ") + 2
