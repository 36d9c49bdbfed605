"""One-token decoding of lightning attention on one GPU, beside fla-core's fused recurrent kernel.

    python -m benchmarks.bench_decode

64 heads, D = 128, bfloat16 inputs, float32 states, fixed decay per head. Floor: the state read
once and written once at the bandwidth of a device copy. Medians; "eager" includes the host's
launch, "graph" replays the same launches from a CUDA graph. Writes
benchmarks/results/<hardware>/decode.json.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import ROOT, copy_tb_per_s, graph_of, hardware, host_us, median_ms
from seqpar.kernels.lightning import lightning_step

HEADS, DIM = 64, 128
BATCHES = (1, 16, 64, 256)


def steps(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor
) -> dict[str, Callable[[], Any]]:
    target = torch.empty_like(state)
    found: dict[str, Callable[[], Any]] = {
        "seqpar": lambda: lightning_step(q, k, v, state, log_decay=decay),
        "copy": lambda: target.copy_(state),
    }
    if importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        found["fla"] = lambda: fused_recurrent_simple_gla(
            q, k, v, g_gamma=decay, scale=1.0, initial_state=state, output_final_state=True
        )
    return found


@torch.no_grad()
def main() -> None:
    folder, about = hardware()
    rate = copy_tb_per_s()
    rows: list[dict[str, Any]] = []
    decay = -(2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)).float()
    for batch in BATCHES:
        shape = (batch, 1, HEADS, DIM)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        state = torch.randn(batch, HEADS, DIM, DIM, device="cuda")
        floor_us = 2e6 * state.numel() * 4 / rate / 1e12
        for name, run in steps(q, k, v, state, decay).items():
            eager, graph = (1e3 * median_ms(x, 20.0) for x in (run, graph_of(run)))
            rows.append(
                {"name": name, "batch": batch, "eager_us": eager, "graph_us": graph}
                | {"host_us": host_us(run)}
                | {"floor_us": floor_us, "graph_share": floor_us / graph}
            )
            print(
                f"{name:<7} batch {batch:<4} eager {eager:8.1f} us  graph {graph:8.1f} us  "
                f"floor {floor_us:7.1f} us ({floor_us / graph:.2f})",
                flush=True,
            )
    path: Path = ROOT / f"benchmarks/results/{folder}/decode.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "copy_tb_per_s": rate, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
