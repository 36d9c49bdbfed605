# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""One-token decoding of lightning attention on one GPU, beside fla-core's fused recurrent kernel.

    python -m benchmarks.bench_decode

64 heads, D = 128, bfloat16 inputs, float32 states, fixed decay per head. "seqpar" is
`lightning_step`, "deferred" `DecodingState`; "copy" and "read" are of the state. Floors at the
bandwidth of a device copy: the state read once and written once; for "deferred" read once, and an
eighth of it written (at batch 1 all of it); for "read" read once. Medians in microseconds, the
level-2 cache flushed between steps: "eager" includes the host's launch, "graph" replays the same
launches from a CUDA graph. "layers" is one step of a graph of many layers' steps in turn, each on
a state of its own, as decoding runs them: the mean over replays. Writes
benchmarks/results/<hardware>/decode.json.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu_timing import (
    ROOT,
    copy_tb_per_s,
    graph_of,
    hardware,
    host_us,
    mean_us,
    median_ms,
)
from seqpar.kernels.lightning import DecodingState, lightning_step

HEADS, DIM = 64, 128
LAYERS = {1: 32, 16: 8, 64: 3, 256: 2}
"""By batch; their states together are 134 MB and more, which no level-2 cache holds."""

Run = Callable[[], Any]
Maker = Callable[[], Run]


@triton.jit
def read_kernel(p_x, p_sums, COLUMNS: tl.constexpr):
    """The sum of each row."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_row * COLUMNS + tl.arange(0, COLUMNS)
    b_x = tl.load(p_row, eviction_policy="evict_first")
    tl.store(p_sums + i_row, tl.sum(b_x, 0))


def makers(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> dict[str, Maker]:
    """By name, what makes a layer, with a state of its own, and gives its step."""

    def new_state() -> Tensor:
        return torch.randn(q.shape[0], HEADS, DIM, DIM, device="cuda")

    def seqpar() -> Run:
        state = new_state()
        return lambda: lightning_step(q, k, v, state, log_decay=decay)

    def deferred() -> Run:
        state = DecodingState(new_state(), dtype=q.dtype)
        return lambda: state.step(q, k, v, log_decay=decay)

    def copy() -> Run:
        state, target = new_state(), new_state()
        return lambda: target.copy_(state)

    def read() -> Run:
        state = new_state().view(-1, 4096)
        sums = torch.empty(len(state), device="cuda")
        return lambda: read_kernel[(len(state),)](state, sums, 4096)

    found: dict[str, Maker] = {"seqpar": seqpar, "deferred": deferred, "copy": copy, "read": read}
    if importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        def fla() -> Run:
            state = new_state()
            return lambda: fused_recurrent_simple_gla(
                q, k, v, g_gamma=decay, scale=1.0, initial_state=state, output_final_state=True
            )

        found["fla"] = fla
    return found


def layers_us(make: Maker, layers: int) -> float:
    """A layer's step among others', from a graph of all of them."""
    steps = [make() for _ in range(layers)]  # their states live as long as the graph

    replay = graph_of(lambda: [step() for step in steps])  # at once: no result in another's place
    return mean_us(replay, replays=64 if layers > 3 else 16) / layers


def measure(make: Maker, layers: int) -> dict[str, float]:
    """Times of one participant."""
    run = make()
    eager, graph = (1e3 * median_ms(x, 20.0) for x in (run, graph_of(run)))
    host = host_us(run)
    del run
    return {
        "eager_us": eager, "graph_us": graph, "host_us": host,
        "layers_us": layers_us(make, layers),
    }  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    """One line of the table; shares of the floor in brackets."""
    return (
        f"{row['name']:<9} batch {row['batch']:<4} eager {row['eager_us']:7.1f}  "
        f"graph {row['graph_us']:7.1f} ({row['graph_share']:.2f})  "
        f"layers {row['layers_us']:7.1f} ({row['layers_share']:.2f})  "
        f"host {row['host_us']:6.1f}  floor {row['floor_us']:6.1f}"
    )


@torch.no_grad()
def main() -> None:
    folder, about = hardware()
    rate = copy_tb_per_s()
    rows: list[dict[str, Any]] = []
    decay = -(2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)).float()
    for batch, layers in LAYERS.items():
        shape = (batch, 1, HEADS, DIM)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        moved_us = 4e6 * batch * HEADS * DIM * DIM / rate / 1e12
        written = {"deferred": 1 / 8 if batch > 1 else 1, "read": 0}
        for name, make in makers(q, k, v, decay).items():
            floor = moved_us * (1 + written.get(name, 1))
            row = {"name": name, "batch": batch, "floor_us": floor, **measure(make, layers)}
            row |= {f"{x}_share": floor / row[f"{x}_us"] for x in ("graph", "layers")}
            rows.append(row)
            print(describe(row), flush=True)
    path: Path = ROOT / f"benchmarks/results/{folder}/decode.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "copy_tb_per_s": rate, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
