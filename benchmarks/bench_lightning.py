"""Lightning attention on one GPU: time, share of the memory floor, memory and error, beside peers.

    python -m benchmarks.bench_lightning                  # everything, about two minutes
    python -m benchmarks.bench_lightning --only shapes    # one part: see PARTS
    python -m benchmarks.bench_lightning --plot           # redraw the plot from the JSON file

Prints each row and writes benchmarks/results/<hardware>/lightning.json as the rows come, what is
asked for most first. Peers are measured beside us, in turns, if they are installed: fla-core
(chunk_simple_gla, chunks of 64 and 128) and lightning_attn (OpenNLPLab). fla tunes itself at its
first calls, for minutes where its choices are not on disk. With a decay per token only its forward
is measured: it refuses to run its backward on Hopper below Triton 3.7.1.

Floor: every input read once and every output written once, 4 tensors forward and 7 backward, at
the bandwidth of a device copy measured in the same run. Times are medians of CUDA events with the
level-2 cache flushed between calls, in rounds, so that all rows of a shape meet the same device;
backward is autograd's, through each package's own function.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import ROOT, copy_tb_per_s, graph_of, hardware, host_us, median_ms
from benchmarks.lightning_peers import DIM, Function, decay_of, make_inputs, participants
from benchmarks.lightning_plot import plot
from seqpar.kernels.lightning.reference import quadratic_attention

LARGE = ((1, 131072, 32), (4, 32768, 32))
SMALL = (1, 8192, 32)
LONG = (1, 1048576, 16)
HEADS = 32
"""Of the other parts: peers tune themselves anew for each number of heads."""
PARTS = ("shapes", "packed", "memory", "error", "lengths", "long", "error_long", "cold")
ROUNDS = 12
"""On a hot device medians of six are 2 % apart."""
BUDGET_MS = 15.0
"""Of one measurement of a round."""
Row = dict[str, Any]
Who = dict[str, Function]


# -- the rows of one shape --------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One row to measure: who, with which decay and further arguments."""

    name: str
    run: Function
    kind: str
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """OpenNLPLab's calls take up to 0.2 s: one round."""
        return 1 if self.name == "OpenNLPLab" else ROUNDS


def measure(entries: list[Entry], inputs: tuple[Tensor, ...], tb_per_s: float) -> list[Row]:
    """A row for each entry, all on the same inputs, in turns.

    At its power limit the device is slower the warmer it is, so what is compared is measured
    round by round, in reverse order every second round; a time is the median of the rounds.
    """
    batch, tokens, heads, _ = inputs[0].shape
    rounds = ROUNDS if batch * tokens * heads <= 1 << 22 else ROUNDS // 2
    calls = [calls_of(entry, inputs) for entry in entries]
    times: list[dict[str, list[float]]] = [{way: [] for way in made} for made in calls]
    for turn in range(rounds):
        order = range(len(entries))
        for i in order if turn % 2 == 0 else reversed(order):
            if turn < entries[i].rounds:
                for way, call in calls[i].items():
                    times[i][way].append(median_ms(call, BUDGET_MS))
    floor = batch * tokens * heads * DIM * 2 / tb_per_s / 1e9
    rows = []
    for entry, found in zip(entries, times, strict=True):
        row: Row = {"name": entry.name, "shape": [batch, tokens, heads], "decay": entry.kind}
        for way, each in found.items():
            row[f"{way}_ms"] = statistics.median(each)
            tensors = 7 if way.startswith("backward") else 4
            row[f"{way}_share"] = tensors * floor / row[f"{way}_ms"]
        if (batch, tokens, heads) == SMALL and "backward" in found and entry.rounds > 1:
            row |= host_times(entry.run, inputs, decay_of(entry.kind, *SMALL))
        rows.append(row)
    compare(entries, rows)
    return rows


def compare(entries: list[Entry], rows: list[Row]) -> None:
    """Write into our rows how many times as long each peer takes with the same inputs."""
    for entry, row in zip(entries, rows, strict=True):
        if entry.name != "seqpar":
            continue
        for other, peer in zip(entries, rows, strict=True):
            if other.name != "seqpar" and (other.kind, bool(other.more)) == (
                entry.kind,
                bool(entry.more),
            ):
                ways = [way for way in ("forward", "backward") if f"{way}_ms" in peer]
                times = {way: peer[f"{way}_ms"] / row[f"{way}_ms"] for way in ways}
                row.setdefault("times", {})[other.name] = times


def calls_of(entry: Entry, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """What of an entry is timed, by name."""
    batch, tokens, heads, _ = inputs[0].shape
    decay = decay_of(entry.kind, batch, tokens, heads)
    forward, backward = forward_backward(entry.run, inputs, decay, **entry.more)
    calls: dict[str, Callable[[], Any]] = {"forward": forward, "backward": backward}
    if tokens * batch <= SMALL[1] and entry.rounds > 1:
        calls["forward_graph"] = graph_of(forward)
    if entry.kind == "token" and entry.name == "seqpar":
        calls["backward_without_decay"] = forward_backward(
            entry.run, inputs, decay, learn_decay=False, **entry.more
        )[1]
    elif entry.kind == "token":
        del calls["backward"]  # refused on Hopper
    for call in calls.values():
        call()
    return calls


def forward_backward(
    run: Function,
    inputs: tuple[Tensor, ...],
    decay: Tensor | None,
    *,
    learn_decay: bool = True,
    **more: Any,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two calls to time: forward without a graph for autograd, and backward alone."""
    *leaves, do = inputs
    wanted = [x.detach().requires_grad_() for x in leaves]
    learned = decay
    if decay is not None and decay.ndim == 3 and learn_decay:
        learned = decay.detach().requires_grad_()
        wanted.append(learned)
    o = run(*wanted[:3], learned, **more)

    def forward() -> Any:
        with torch.no_grad():
            return run(*leaves, decay, **more)

    return forward, lambda: torch.autograd.grad(o, wanted, do, retain_graph=True)


def host_times(run: Function, inputs: tuple[Tensor, ...], decay: Tensor | None) -> Row:
    """What a call costs the host, eager."""
    *leaves, do = inputs
    wanted = [x.detach().requires_grad_() for x in leaves]
    with torch.no_grad():
        forward = host_us(lambda: run(*leaves, decay))
    both = host_us(lambda: torch.autograd.grad(run(*wanted, decay), wanted, do))
    return {"forward_host_us": forward, "both_host_us": both}


def describe(row: Row) -> str:
    """A row of the table."""
    text = f"{row['name']:<11} " + " ".join(
        str(row[key]) for key in ("shape", "documents", "decay") if key in row
    )
    for way in ("forward", "backward"):
        if f"{way}_ms" in row:
            text += f"  {way} {row[f'{way}_ms']:8.3f} ms ({row[f'{way}_share']:.2f})"
    for key in ("forward_graph_ms", "backward_without_decay_ms", "forward_host_us", "both_host_us",
                "forward_over_whole", "backward_over_whole", "extra_share", "cold_start_s",
                ):  # fmt: skip
        if key in row:
            text += f"  {key} {row[key]:.3f}"
    for name, times in row.get("times", {}).items():
        text += f"  {name} takes " + " / ".join(f"{x:.2f}" for x in times.values()) + " times"
    for name, error in row.get("errors", {}).items():
        text += f"  {name} {error:.2e}"
    return text


# -- the parts --------------------------------------------------------------------------------


def part_shapes(tb_per_s: float, who: Who) -> Iterator[Row]:
    takes = {"lightning": set(who), "token": {"seqpar", "fla C=64"}}
    for shape in (*LARGE, SMALL):
        entries = [
            Entry(name, run, kind)
            for kind in ("lightning", "none", "mean", "token")
            for name, run in who.items()
            if name in takes.get(kind, {"seqpar"})
        ]
        yield from measure(entries, make_inputs(*shape), tb_per_s)


def part_packed(tb_per_s: float, who: Who) -> Iterator[Row]:
    """64 documents of lognormal lengths, in turns with as many tokens in one piece."""
    shape = LARGE[0]
    lengths = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    lengths = (lengths / lengths.sum() * shape[1]).long().clamp(min=1)
    lengths[0] += shape[1] - lengths.sum()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    entries = []
    for name, run in who.items():
        if name != "OpenNLPLab":  # takes no packed documents
            given = bounds.long().cuda() if name.startswith("fla") else bounds
            entries.append(Entry(name, run, "lightning"))
            entries.append(Entry(name, run, "lightning", {"cu_seqlens": given}))
    rows = measure(entries, make_inputs(*shape), tb_per_s)
    for whole, row in zip(rows[::2], rows[1::2], strict=True):
        for way in ("forward", "backward"):
            row[f"{way}_over_whole"] = row[f"{way}_ms"] / whole[f"{way}_ms"]
        yield row | {"documents": 64, "longest": int(lengths.max())}


def part_long(tb_per_s: float, who: Who) -> Iterator[Row]:
    """A million tokens, and an eighth of them with as many heads: time per token should agree."""
    if "seqpar" in who:
        for shape in (LONG, (1, LARGE[0][1], LONG[2])):
            entries = [Entry("seqpar", who["seqpar"], kind) for kind in ("lightning", "none")]
            yield from measure(entries, make_inputs(*shape), tb_per_s)


def part_memory(tb_per_s: float, who: Who) -> Iterator[Row]:
    for kind in ("lightning", "token"):
        for name, run in who.items():
            if kind == "lightning" or name == "seqpar":
                row = {"name": name, "shape": list(LARGE[1]), "decay": kind}
                yield row | {"extra_share": extra_memory(run, kind)}


def extra_memory(run: Function, kind: str) -> float:
    """Peak of forward and backward beyond inputs, output and gradients, over q, k, v, o."""
    *leaves, do = make_inputs(*LARGE[1])
    decay = decay_of(kind, *LARGE[1])
    if decay is not None and decay.ndim == 3:
        decay.requires_grad_()
    for x in leaves:
        x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*leaves, decay).backward(do)
    size = do.numel() * do.element_size()
    results = 4 * size + (0 if decay is None or decay.grad is None else decay.numel() * 4)
    return (torch.cuda.max_memory_allocated() - before - results) / (4 * size)


def part_error(tb_per_s: float, who: Who) -> Iterator[Row]:
    """Relative errors against float64, decays from 1 to 0.5, at 1024 tokens."""
    for kind in ("fixed", "token"):
        inputs = make_inputs(1, 1024, HEADS)
        decay = torch.linspace(0.0, -0.6931, HEADS, device="cuda")
        if kind == "token":
            decay = (decay * torch.rand(1, 1024, HEADS, device="cuda") * 2.0).clamp(min=-0.6931)
        reference = gradients(exact_function, tuple(x.double() for x in inputs), decay.double())
        for name, run in who.items():
            if kind == "token" and name not in ("seqpar", "fla C=64"):
                continue
            if kind == "token" and name != "seqpar":
                found = {"o": run(*inputs[:3], decay)}
            else:
                found = gradients(run, inputs, decay)
            errors = {n: relative(found[n], reference[n]) for n in found}
            yield {"name": name, "decay": kind, "errors": errors}


def part_error_long(tb_per_s: float, who: Who) -> Iterator[Row]:
    """The same for 32768 tokens and decays per token of several strengths, ours alone: whether the
    errors of the decays' gradient add up along the sequence. The reference is ours in float64.
    """
    for strength in (0.001, 0.01, 0.1, 0.7):
        if "seqpar" in who:
            inputs = make_inputs(1, 32768, 4)
            decay = -strength * torch.rand(1, 32768, 4, device="cuda")
            run = who["seqpar"]
            reference = gradients(run, tuple(x.double() for x in inputs), decay.double())
            found = gradients(run, inputs, decay)
            errors = {name: relative(found[name], reference[name]) for name in found}
            yield {"name": "seqpar", "decay": f"to {strength}", "tokens": 32768, "errors": errors}


def exact_function(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return quadratic_attention(q, k, v, log_decay=decay)[0]


def gradients(run: Function, inputs: tuple[Tensor, ...], decay: Tensor) -> dict[str, Tensor]:
    *leaves, do = inputs
    wanted = [x.detach().requires_grad_() for x in leaves]
    names = ["dq", "dk", "dv"]
    if decay.ndim == 3:
        decay = decay.detach().requires_grad_()
        wanted.append(decay)
        names.append("dlog_decay")
    o = run(*wanted[:3], decay)
    grads = torch.autograd.grad(o, wanted, do.to(o.dtype))
    return {"o": o.detach(), **dict(zip(names, grads, strict=True))}


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def part_lengths(tb_per_s: float, who: Who) -> Iterator[Row]:
    for exponent in (11, 13, 15, 17, 19):
        entries = [
            Entry(name, run, "lightning")
            for name, run in who.items()
            if name != "OpenNLPLab" or exponent <= 15
        ]
        yield from measure(entries, make_inputs(1, 1 << exponent, HEADS), tb_per_s)


def part_cold(tb_per_s: float, who: Who) -> Iterator[Row]:
    """Seconds of a first forward and backward in a fresh process with an empty kernel cache."""
    if "seqpar" not in who:
        return
    program = (
        "import time, torch\n"
        "from seqpar.kernels.lightning import lightning_attention\n"
        "q, k, v = (torch.randn(1, 8192, 32, 128, device='cuda', dtype=torch.bfloat16,"
        " requires_grad=True) for _ in range(3))\n"
        "g = -torch.rand(32, device='cuda')\n"
        "torch.cuda.synchronize(); start = time.perf_counter()\n"
        "lightning_attention(q, k, v, log_decay=g)[0].sum().backward()\n"
        "torch.cuda.synchronize(); print(time.perf_counter() - start)\n"
    )
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            check=True,
            capture_output=True,
            text=True,
        )
    yield {"name": "seqpar", "cold_start_s": float(done.stdout.split()[-1])}


# -- the run ----------------------------------------------------------------------------------


def run_parts(parts: tuple[str, ...], results: Row, path: Path) -> None:
    """Every part for everyone; the file is whole after each row."""
    everyone, start = participants(), time.perf_counter()
    for part in parts:
        for row in globals()[f"part_{part}"](results["copy_tb_per_s"], everyone):
            results.setdefault(part, []).append(row)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{time.perf_counter() - start:6.1f} s  {describe(row)}", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--plot", action="store_true", help="draw the plot from the JSON file")
    options = parser.parse_args()
    if options.plot:
        path = options.output or ROOT / "benchmarks/results/h200/lightning.json"
        plot(json.loads(path.read_text()), ROOT / "docs/lightning.svg")
        return
    folder, about = hardware()
    path = options.output or ROOT / f"benchmarks/results/{folder}/lightning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: Row = {**about, "copy_tb_per_s": copy_tb_per_s()}
    print(f"{about['device']}: copy {results['copy_tb_per_s']:.2f} TB/s", flush=True)
    run_parts(tuple(options.only), results, path)


if __name__ == "__main__":
    main()
