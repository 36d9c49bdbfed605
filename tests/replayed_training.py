"""A short planned training of a hybrid decoder, recorded or replayed: its losses and weights.

    torchrun --nproc-per-node 2 -m tests.replayed_training --plans p.jsonl --out a.json --again 1
    torchrun --nproc-per-node 2 -m tests.replayed_training --plans p.jsonl --out b.json --replay

Softmax and lightning layers, on CUDA over NCCL (else gloo), in float32 or under bfloat16 autocast;
deterministic unless told otherwise. Plans take turns between a ring and Ulysses. Rank 0 writes
what happened in each run as JSON, floats in full. Ranks say what they do as they go, and where
they stand if they have not ended within a minute.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from seqpar import init_mesh
from seqpar.data import DocumentSampler, PlannedSteps, limit_documents, recorded_plans
from seqpar.determinism import use_deterministic_algorithms, weights_digest
from seqpar.mesh import GroupPool
from seqpar.models import Decoder, DecoderConfig, hybrid
from seqpar.planners import (
    Cluster,
    CostModel,
    Exchange,
    LayerCost,
    Link,
    Planner,
    ScatterPlan,
    ScatterProblem,
)
from seqpar.training import PlanExecutor

STEPS = 4
LATE_S = 60


def train_again(
    rank: int,
    plans: Path,
    replay: bool,
    again: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """A training, and then `again` replays of its plans: fresh models on the same ranks."""
    runs = []
    for run in range(1 + again):
        say(f"{'replay' if replay or run else 'recorded run'} begins")
        runs.append(train(rank, plans, replay or run > 0, dtype=dtype, device=device))
    return runs


def say(what: str) -> None:
    """A line with this rank and the time of day, at once."""
    print(f"{time.strftime('%T')} rank {os.environ.get('RANK', '0')}: {what}\n", end="", flush=True)


def train(
    rank: int,
    plans: Path,
    replay: bool,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Four planned steps on this rank, from one seed: the same on every rank but `rank`."""
    device = device or torch.device("cpu")
    config = _config(on_gpu=device.type == "cuda", dtype=dtype)
    documents = _documents(on_gpu=device.type == "cuda", vocab_size=config.vocab_size)
    torch.manual_seed(0)
    model = Decoder(config).to(device)
    executor = PlanExecutor(
        model,
        GroupPool(),
        world=dist.group.WORLD,
        device=device,
        autocast=None if dtype == torch.float32 else dtype,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    lengths = [len(document) for document in documents]
    steps = PlannedSteps(
        DocumentSampler(lengths, budget_tokens=3 * max(lengths), seed=2),
        recorded_plans(plans) if replay else _planner(lengths, executor.num_ranks),
        group=dist.group.WORLD,
        record=None if replay else plans,
    )
    losses, groups = [], []
    for _ in range(STEPS):
        planned = next(steps)
        drawn = [documents[i] for i in planned.documents]
        result = executor.forward_backward(planned.plan, drawn)
        losses.append(result.loss.hex())
        say(f"step {planned.step}: loss {result.loss:.6f}, {result.step_ms:,.0f} ms")
        groups += [(g.degree, g.strategy) for m in planned.plan.micro_batches for g in m.groups]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    steps.close()
    weights = [""] * executor.num_ranks
    dist.all_gather_object(weights, weights_digest(model))
    return {"losses": losses, "groups": sorted(set(groups)), "weights": weights}


def _config(*, on_gpu: bool, dtype: torch.dtype) -> DecoderConfig:
    """Heads of 128 in 16 bits, whose kernels are Hopper's own; the demo's sizes in float32."""
    if not on_gpu:
        sizes = {"dim": 32, "num_heads": 2, "softmax_kv_heads": 1, "softmax_head_dim": 8}
    elif dtype == torch.float32:
        sizes = {"dim": 256, "num_heads": 4, "softmax_kv_heads": 1, "softmax_head_dim": 32}
    else:
        sizes = {"dim": 512, "num_heads": 4, "softmax_kv_heads": 2, "softmax_head_dim": 128}
    return hybrid(
        vocab_size=256,
        num_layers=4,
        hidden=3 * sizes["dim"] // 2,
        softmax_every=2,
        softmax_heads=8 if sizes["softmax_head_dim"] == 128 else 2,
        **sizes,
    )


def _documents(*, on_gpu: bool, vocab_size: int) -> list[torch.Tensor]:
    """Forty of lognormal lengths; the longest fit no single device of `_planner`'s."""
    rng = np.random.default_rng(3)
    scale, longest = (1500, 12_000) if on_gpu else (40, 300)
    lengths = [longest, *rng.lognormal(np.log(scale), 1.2, 39)]
    whole = [torch.from_numpy(rng.integers(vocab_size, size=max(2, int(n)))) for n in lengths]
    return limit_documents(whole, context_tokens=longest, over_limit="split")


def _planner(lengths: Sequence[int], ranks: int) -> Any:
    """Plans by a ring in even steps and by Ulysses in odd ones."""
    tokens_per_device = 0.7 * max(lengths) if ranks > 1 else 1.5 * max(lengths)
    cluster = Cluster(devices=ranks, memory_bytes=tokens_per_device)

    def plan_documents(step: int, drawn: Sequence[int]) -> ScatterPlan:
        cost = CostModel(
            name="replayed",
            layers=(LayerCost(kind="softmax", quadratic_ms=1e-5, linear_ms=0.01),),
            exchanges=(Exchange(strategy=("ring", "ulysses")[step % 2], bytes_per_token=1e4),),
            links=(Link(degree=2, gib_per_s=1.0),),
            memory_bytes_per_token=1.0,
        )
        return Planner(time_limit_ms=20).plan(ScatterProblem(tuple(drawn), cluster, cost))

    return plan_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--again", type=int, default=0, help="replays after it, on the same ranks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--any-order", action="store_true", help="torch's default algorithms")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(LATE_S, repeat=True)
    say("has its imports")
    if not options.any_order:
        use_deterministic_algorithms()
    mesh = init_mesh(sp=int(os.environ["WORLD_SIZE"]))
    device = torch.device(mesh.device_type)
    if mesh.device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    rank, dtype = dist.get_rank(), getattr(torch, options.dtype)
    say(f"is connected, on {device}")
    runs = train_again(
        rank, options.plans, options.replay, options.again, dtype=dtype, device=device
    )
    if rank == 0:
        options.out.write_text(json.dumps(runs) + "\n")
        print(json.dumps(runs), flush=True)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
