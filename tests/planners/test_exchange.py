"""The exchange model: limits that must hold, and the choices it makes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from seqpar.errors import PlanError
from seqpar.planners.exchange import (
    INFINIBAND_NDR,
    NVLINK_H200,
    PEERS_H200,
    ExchangeProblem,
    Link,
    choose_exchange,
    exchange_ms,
)
from seqpar.planners.exchange_plot import main, plot_exchanges

MIB = 2**20
ROOT = Path(__file__).parents[2]
PROBLEM = ExchangeProblem(
    world_size=8, reach=7, state_bytes=2 * MIB, tokens=8192, token_bytes=32768, heads=32
)


def test_measured_all_gathers_of_two_h200s_are_met() -> None:
    """2 to 256 MiB a rank, NCCL 2.28.9."""
    for mib, measured_us in ((2, 31), (16, 114), (32, 162), (256, 1069)):
        problem = replace(PROBLEM, world_size=2, reach=1, state_bytes=mib * MIB)
        estimate = exchange_ms("all_gather", problem, NVLINK_H200) * 1e3
        assert estimate == pytest.approx(measured_us, rel=0.25)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_model_is_near_what_the_docs_plot(ranks: int) -> None:
    """All but the chains over 4 ranks, whose hops of one call meet those of the next."""
    results = json.loads((ROOT / f"benchmarks/results/h200-x{ranks}/state.json").read_text())
    for row in results["exchange_ms"]:
        problem = replace(
            PROBLEM, world_size=ranks, reach=ranks - 1, state_bytes=row["state_bytes"]
        )
        for name, link in (("all_gather", NVLINK_H200), ("log_step", NVLINK_H200)):
            assert exchange_ms(name, problem, link) == pytest.approx(row[name], rel=0.35), name
        if problem.state_bytes <= 8 * MIB:
            peers = exchange_ms("all_gather", problem, PEERS_H200)
            assert peers == pytest.approx(row["all_gather, peers"], rel=0.4)


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


def _chosen(link: Link, mib: int = 2, tokens: int = 8192) -> dict[int, str]:
    """By number of ranks, 2 to 1,024: what auto takes."""
    ranks = [2**power for power in range(1, 11)]
    layer = replace(PROBLEM, state_bytes=mib * MIB, tokens=tokens)
    return {
        w: choose_exchange(replace(layer, world_size=w, reach=w - 1), link).exchange for w in ranks
    }


def test_what_wins_where_is_as_the_docs_say() -> None:
    nvlink, infiniband = _chosen(NVLINK_H200), _chosen(INFINIBAND_NDR)
    assert [w for w, name in nvlink.items() if name == "log_step"] == [2**i for i in range(5, 11)]
    assert [w for w, name in infiniband.items() if name == "log_step"] == [
        2**i for i in range(3, 11)
    ]
    assert {*nvlink.values(), *infiniband.values()} == {"all_gather", "log_step"}
    large = _chosen(INFINIBAND_NDR, mib=32)
    assert [w for w, name in large.items() if name == "pipelined_chain"] == [4, 8, 16]
    for link, most in ((NVLINK_H200, 64), (INFINIBAND_NDR, 256)):
        assert _chosen(link, tokens=most)[8] == "all_to_all" != _chosen(link, tokens=2 * most)[8]
        assert _chosen(link, mib=128)[8] == "all_to_all"


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


def _marks(picture: Path) -> set[str]:
    """What its lines and points say of themselves."""
    return set(re.findall(r'id="((?:measured|model): [^"]*)"', picture.read_text()))


def test_the_plot_shows_what_was_measured(tmp_path: Path) -> None:
    measured = []
    for ranks in (2, 4):
        row = {"state_bytes": 2 * MIB, "all_gather": 0.05, "chain": 0.07}
        tokens = {"tokens": 1024, "all_to_all": 0.2}
        results = {"world_size": ranks, "exchange_ms": [row], "token_exchange_ms": [tokens]}
        measured.append(tmp_path / f"{ranks}.json")
        measured[-1].write_text(json.dumps(results))
    plain, dotted = tmp_path / "plain.svg", tmp_path / "dotted.svg"
    plot_exchanges(plain)
    main([str(dotted), "--measured", *map(str, measured)])
    found = {mark for mark in _marks(dotted) if mark.startswith("measured")}
    assert found == _marks(dotted) - _marks(plain)
    assert found == {
        "measured: all_gather, 2 ranks, 8192 tokens, 0.0500 ms",
        "measured: all_gather, 4 ranks, 8192 tokens, 0.0500 ms",
        "measured: chain, 2 ranks, 8192 tokens, 0.0700 ms",
        "measured: chain, 4 ranks, 8192 tokens, 0.0700 ms",
        "measured: all_to_all, 2 ranks, 1024 tokens, 0.2000 ms",
    }


def test_the_plot_of_the_docs_is_of_this_model_and_these_results(tmp_path: Path) -> None:
    results = [ROOT / f"benchmarks/results/h200-x{ranks}/state.json" for ranks in (2, 4)]
    plot_exchanges(tmp_path / "now.svg", measured=results)
    message = "draw it again: see seqpar/planners/exchange_plot.py"
    assert _marks(ROOT / "docs" / "state-exchange.svg") == _marks(tmp_path / "now.svg"), message
