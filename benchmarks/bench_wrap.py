"""What wrapping costs and what it buys: Llama- and MiniMax-shaped models of 1B parameters.

    torchrun --nproc-per-node 2 -m benchmarks.bench_wrap --out wrap.json            # two GPUs
    torchrun --nproc-per-node 2 -m benchmarks.bench_wrap --tiny --out /tmp/wrap.json  # on CPU

- parity: tiny fp32 models on these ranks against one device.
- overhead: the wrapped model on one rank against the unwrapped one with torch's attention.
- head: the loss of the LM head without its logits, ours and Liger's.
- scaling: tokens a second a GPU on all ranks, by strategy and peer, against one GPU on the same
  stream (wrap_scaling.py).
- hybrid: the same of seven lightning layers to one softmax layer, with experts.
- longest: the longest stream that trains, ours and the peers' (wrap_longest.py).
- tiling_time: what tiling and offloading cost a step.

A section that would begin after the time limit is left out and said so. The file's other sections
stay as they were, so that sections may be measured one by one; each carries its own command.
Results are written whenever a section has more of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.wrap_head import head
from benchmarks.wrap_longest import WAYS, longest, tiling_time
from benchmarks.wrap_scaling import hybrid, scaling
from benchmarks.wrap_turns import Step, Way, in_turns
from benchmarks.wrapped import FAILURES, LLAMA, Machine
from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.loss import token_loss_sum
from seqpar.parity import check_parity
from seqpar.wrap import parallelize, unparallelize


def overhead(machine: Machine) -> Iterator[dict[str, Any]]:
    """One rank, no exchange: the wrapped call against the model's own."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    count = machine.tokens(32768)
    model = machine.model("llama", LLAMA, checkpointed=False)
    batch = machine.batch(count, None, "contiguous")

    def step(inputs: dict[str, Any]) -> Tensor:
        loss = token_loss_sum(model(**inputs).logits, batch.labels)[0] / count
        loss.backward()
        return loss.detach()

    @contextmanager
    def unwrapped(*backends: SDPBackend) -> Iterator[Step]:
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            yield lambda: step({"input_ids": batch.ids, "use_cache": False})

    @contextmanager
    def wrapped() -> Iterator[Step]:
        parallelize(model, None)
        yield lambda: step(batch.inputs)
        unparallelize(model)

    ways: dict[str, Way] = {"sdpa": unwrapped}
    if machine.cuda:
        ways["sdpa_cudnn"] = functools.partial(unwrapped, SDPBackend.CUDNN_ATTENTION)
    ways["wrapped"] = wrapped
    for timed in in_turns(machine, model, ways, rounds=4, warm=1):
        best = min(each.ms for name, each in timed.items() if name != "wrapped")
        yield {
            "tokens": count,
            **{f"{name}_ms": each.ms for name, each in timed.items()},
            "ms_by_round": {name: list(each.series_ms) for name, each in timed.items()},
            "wrapped_over_best": round(timed["wrapped"].ms / best, 4),
        }


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
    parser.add_argument("--commit", default="unknown", help="of what is measured")
    parser.add_argument("--ways", default=",".join(WAYS), help="the rows of longest")
    options = parser.parse_args()
    machine = Machine(
        tiny=options.tiny, time_limit_s=options.time_limit_s, ways=options.ways.split(",")
    )
    out = Path(options.out)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    command = f"torchrun --nproc-per-node {machine.ranks} -m benchmarks.bench_wrap"
    measured = {
        "command": " ".join([command, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": options.commit,
        "ranks": machine.ranks,
        **machine.hardware(),
    }
    for name in options.sections.split(","):
        shown: dict[str, Any] = {}
        for found in run(name, machine):
            if dist.get_rank() == 0:
                news = {key: value for key, value in found.items() if value != shown.get(key)}
                elapsed = time.perf_counter() - machine.began
                print(f"[{elapsed:5.1f} s] {name}: {json.dumps(news)}", flush=True)
                if "left_out" not in found or name not in results:
                    results[name] = {"measured": measured, **found}
                out.write_text(json.dumps(results, indent=2) + "\n")
            shown = dict(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
