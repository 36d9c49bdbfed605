"""Lightning attention on a CPU beside the block loop of transformers' MiniMax layer.

    OMP_NUM_THREADS=2 python -m benchmarks.bench_lightning_cpu

The layer is transformers' own; its projections, norm and gate are replaced by what passes tensors
through, so that its loop over blocks of 256 tokens remains. Both take the same float32 queries,
keys, values and decays, 8192 tokens, 8 heads of 128, in turns; medians. Writes
benchmarks/results/cpu-2-cores/lightning.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from benchmarks.gpu_timing import ROOT
from seqpar.kernels.lightning import lightning_attention

TOKENS, HEADS, DIM = 8192, 8, 128
ROUNDS = 7


class Given(nn.Module):
    """In the place of a projection: what it would have made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.zeros(1)

    def forward(self, _: Tensor) -> Tensor:
        return self.made


def block_loop() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The layer's o [1, T, H * D] from q, k and v side by side [1, T, H * 3D]; log decays [H]."""
    config = MiniMaxConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        head_dim=DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = MiniMaxLightningAttention(config, 0)
    assert layer.block_size == 256
    layer.qkv_proj, layer.output_gate = Given(), Given()
    layer.output_gate.made = torch.full((1,), 100.0)  # a gate that is open
    layer.act_fn = layer.norm = layer.out_proj = nn.Identity()
    hidden = torch.empty(1, TOKENS, HEADS * DIM)

    def run(qkv: Tensor) -> Tensor:
        layer.qkv_proj.made = qkv
        return layer(hidden, None, None)[0]

    return run, -layer.slope_rate.flatten()


def seqpar(qkv: Tensor, log_decay: Tensor) -> Tensor:
    q, k, v = qkv.view(1, TOKENS, HEADS, 3 * DIM).split(DIM, dim=3)
    return lightning_attention(q, k, v, log_decay=log_decay)[0].flatten(2)


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median ms of each, in reverse order every second round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name in list(calls) if turn % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    loop, log_decay = block_loop()
    qkv = torch.randn(1, TOKENS, HEADS * 3 * DIM)
    qkv.mul_(DIM**-0.5)
    do = torch.randn(1, TOKENS, HEADS * DIM)
    learned = qkv.clone().requires_grad_()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "seqpar": lambda x: seqpar(x, log_decay),
        "MiniMax": loop,
    }
    with torch.no_grad():
        ours, theirs = (run(qkv) for run in ways.values())
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 1e-4, error
        forward = in_turns({name: lambda run=run: run(qkv) for name, run in ways.items()})
    both = in_turns(
        {n: lambda r=run: torch.autograd.grad(r(learned), learned, do) for n, run in ways.items()}
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    results = {
        "cpu": platform.processor() or platform.machine(), "threads": 2,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": os.environ.get("SEQPAR_COMMIT", commit),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "shape": [1, TOKENS, HEADS, DIM], "dtype": "float32", "relative_difference": error,
        "forward_ms": forward, "forward_and_backward_ms": both,
    }  # fmt: skip
    for way, found in (("forward", forward), ("forward and backward", both)):
        times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.items())
        print(f"{way}: {times}: {found['MiniMax'] / found['seqpar']:.1f} times")
    path = ROOT / "benchmarks/results/cpu-2-cores/lightning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
