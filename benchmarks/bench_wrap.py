"""What wrapping costs and what it buys: Llama- and MiniMax-shaped models of 1B parameters.

    torchrun --nproc-per-node 2 -m benchmarks.bench_wrap --out wrap.json            # two GPUs
    torchrun --nproc-per-node 2 -m benchmarks.bench_wrap --tiny --out /tmp/wrap.json  # on CPU

- parity: tiny fp32 models on these ranks against one device.
- overhead: the wrapped model on one rank against the unwrapped one with torch's attention.
- head: the loss of the LM head without its logits, ours and Liger's.
- scaling: tokens a second a GPU on all ranks, by strategy, against one GPU on the same stream
  (share = one GPU's time over ranks times ours) and against peers (wrap_peers.py).
- hybrid: seven lightning layers to one softmax layer, with experts: share of ideal scaling.
- longest: the longest stream that trains, ours and the peers' (wrap_longest.py).
- tiling_time: what tiling and offloading cost a step.

A section that would begin after the time limit is left out and said so. The file's other sections
stay as they were, so that sections may be measured one by one; each carries its own command.
Results are written whenever a section has more of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.wrap_head import head
from benchmarks.wrap_longest import FAILURES, longest, tiling_time
from benchmarks.wrap_peers import deepspeed_ulysses, torch_context_parallel
from benchmarks.wrapped import LLAMA, MINIMAX, Machine
from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.loss import chunked_token_loss, token_loss_sum
from seqpar.parity import check_parity
from seqpar.wrap import parallelize, unparallelize


def overhead(machine: Machine) -> dict[str, Any]:
    """One rank, no exchange: the wrapped call against the model's own."""
    count = machine.tokens(32768)
    model = machine.model("llama", LLAMA, checkpointed=False)
    batch = machine.batch(count, None, "contiguous")

    def step(inputs: dict[str, Any]) -> None:
        (token_loss_sum(model(**inputs).logits, batch.labels)[0] / count).backward()

    def took(inputs: dict[str, Any]) -> float:
        return machine.time_ms(model, lambda: step(inputs), repeats=3)[0]

    plain = {"input_ids": batch.ids, "use_cache": False}
    found: dict[str, Any] = {"tokens": count, "sdpa_ms": took(plain)}
    if machine.cuda:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            found["sdpa_cudnn_ms"] = took(plain)
    parallelize(model, None)
    found["wrapped_ms"] = took(batch.inputs)
    best = min(value for name, value in found.items() if name.startswith("sdpa"))
    return {**found, "wrapped_over_best": round(found["wrapped_ms"] / best, 4)}


def parity(machine: Machine) -> dict[str, Any]:
    """Tiny fp32 models on these ranks against one device: (loss error, gradient error)."""
    found = {}
    for family in ("llama", "mistral", "minimax", "mamba2"):
        model = parallelize(tiny_model(family).to(machine.device), machine.mesh)
        stream = tiny_stream(model, (130, 1, 290, 27))
        batch = shard(stream, machine.mesh, layout="zigzag", device=machine.device)
        report = check_parity(model, batch, loss_tolerance=1.0, gradient_tolerance=1.0)
        found[family] = (report.loss_error, report.gradient_error, report.worst_parameter)
    return found


def hybrid(machine: Machine) -> dict[str, Any]:
    """A MiniMax-shaped model, 65,536 tokens a rank, against one GPU on the whole stream."""
    count = machine.tokens(65536) * machine.ranks
    model = machine.model("minimax", MINIMAX, checkpointed=True)
    found = {"parameters": sum(p.numel() for p in model.parameters()), "tokens": count}
    return {**found, **_strategies(machine, model, count)}


def scaling(machine: Machine) -> dict[str, Any]:
    """All ranks on one stream, layers recomputed, by strategy and peer."""
    count = machine.tokens(65536)
    model = machine.model("llama", LLAMA, checkpointed=True)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": count,
        **_strategies(machine, model, count),
    }

    def peer(step: Callable[[int], Tensor]) -> dict[str, float]:
        took, share = machine.time_ms(model, lambda: step(count), repeats=1)
        loss = machine.total(float(share))
        return _rate(count, took, machine.ranks, found["one_gpu"]["ms"], loss)

    def ulysses() -> dict[str, float]:
        with deepspeed_ulysses(machine, model, tiled_mlp=False) as step:
            return peer(step)

    peers = {
        "torch_context_parallel": lambda: peer(lambda n: torch_context_parallel(machine, model, n)),
        "deepspeed_ulysses": ulysses,
    }
    for name, run in peers.items():
        try:
            found[name] = run()
        except FAILURES as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def _strategies(machine: Machine, model: nn.Module, count: int) -> dict[str, Any]:
    def took(where: Any, strategy: Any, layout: str, repeats: int) -> tuple[float, float]:
        parallelize(model, where, strategy=strategy)
        batch = machine.batch(count, where, layout)

        def step() -> Tensor:
            loss = chunked_token_loss(model, batch)
            loss.backward()
            return loss.detach()

        time_ms, loss = machine.time_ms(model, step, repeats=repeats)
        unparallelize(model)
        return time_ms, float(loss)

    one, loss = took(None, "auto", "contiguous", 1)
    found: dict[str, Any] = {"one_gpu": _rate(count, one, 1, one, loss)}
    for strategy, layout in (("ring", "zigzag"), ("ulysses", "contiguous")):
        split, loss = took(machine.mesh, strategy, layout, 1)
        found[f"{strategy}_{layout}"] = _rate(count, split, machine.ranks, one, loss)
    return found


def _rate(count: int, took_ms: float, ranks: int, one_ms: float, loss: float) -> dict[str, float]:
    return {
        "ms": took_ms,
        "tokens_per_s_per_gpu": round(count / took_ms * 1e3 / ranks),
        "share_of_ideal": round(one_ms / (ranks * took_ms), 4),
        "loss": round(loss, 5),
    }


SECTIONS: dict[str, Callable[[Machine], Any]] = {
    f.__name__: f for f in (parity, overhead, head, scaling, hybrid, longest, tiling_time)
}


def run(name: str, machine: Machine) -> Iterator[dict[str, Any]]:
    """A section's results as they grow, unless the time is up; what fails is recorded."""
    found = machine.left_out()
    if found is not None:
        yield found
        return
    found = {}
    try:
        section = SECTIONS[name](machine)
        for found in [section] if isinstance(section, dict) else section:
            yield found
    except FAILURES as error:
        yield {**found, "failed": f"{type(error).__name__}: {error}"[:600]}
    machine.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--time-limit-s", type=float, default=300.0)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    options = parser.parse_args()
    machine = Machine(tiny=options.tiny, time_limit_s=options.time_limit_s)
    out = Path(options.out)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    command = f"torchrun --nproc-per-node {machine.ranks} -m benchmarks.bench_wrap"
    measured = {
        "command": " ".join([command, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "ranks": machine.ranks,
        **machine.hardware(),
    }
    for name in options.sections.split(","):
        shown: set[str] = set()
        for found in run(name, machine):
            if dist.get_rank() == 0:
                news = {key: value for key, value in found.items() if key not in shown}
                elapsed = time.perf_counter() - machine.began
                print(f"[{elapsed:5.1f} s] {name}: {json.dumps(news)}", flush=True)
                if "left_out" not in found or name not in results:
                    results[name] = {"measured": measured, **found}
                out.write_text(json.dumps(results, indent=2) + "\n")
            shown.update(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
