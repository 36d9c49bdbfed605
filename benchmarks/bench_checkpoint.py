"""What a checkpoint every 50 steps costs a step: blocks with and without one, alternating.

python benchmarks/bench_checkpoint.py [--blocks 6]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from seqpar.launch.checkpoint import CheckpointStore

EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6, help="pairs of blocks of 50 steps")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(256, 512)

    def block() -> float:
        started = time.perf_counter()
        for _ in range(EVERY):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        return time.perf_counter() - started

    block()
    plain, saving, blocked = [], [], []
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(folder) as store:
        for number in range(settings.blocks):
            plain.append(block())
            started = time.perf_counter()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            store.save_async(number, state, {"step": number})
            blocked.append(time.perf_counter() - started)
            saving.append(block() + blocked[-1])
            store.wait()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {
        "parameters": parameters,
        "step_ms": round(statistics.median(plain) / EVERY * 1e3, 2),
        "blocked_ms": round(statistics.median(blocked) * 1e3, 2),
        "overhead_percent": round(
            (statistics.median(saving) / statistics.median(plain) - 1) * 100, 2
        ),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))
    path = Path("benchmarks/results") / f"cpu-{os.cpu_count()}-cores" / "checkpoint.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
