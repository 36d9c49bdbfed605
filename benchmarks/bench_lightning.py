"""Lightning attention on one GPU: time, share of the memory floor, memory and error, beside peers.

    python -m benchmarks.bench_lightning                  # everything, about three minutes
    python -m benchmarks.bench_lightning --only shapes    # one part: see PARTS
    python -m benchmarks.bench_lightning --plot           # redraw the plot from the JSON file

Writes benchmarks/results/<hardware>/lightning.json. Peers are measured in the same run if they
are installed: fla-core (chunk_simple_gla, chunks of 64 and 128) and lightning_attn (OpenNLPLab).

Floor: every input read once and every output written once, 4 tensors forward and 7 backward, at
the bandwidth of a device copy measured in the same run. Times are medians of CUDA events with the
level-2 cache flushed between calls; backward is autograd's, through each package's own function.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels.lightning import lightning_attention
from seqpar.kernels.lightning.reference import quadratic_attention

ROOT = Path(__file__).resolve().parent.parent
LARGE = ((1, 131072, 32), (4, 32768, 32))
SMALL = (1, 8192, 32)
LONG = (1, 1048576, 16)
DIM = 128
PARTS = ("error", "shapes", "memory", "packed", "long", "cold", "lengths")
Function = Callable[..., Tensor]


# -- who takes part ---------------------------------------------------------------------------


def seqpar_function(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, **more: Any) -> Tensor:
    return lightning_attention(q, k, v, log_decay=decay, **more)[0]


def fla_function(chunk: int) -> Function:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, **more: Any) -> Tensor:
        per_token = decay is not None and decay.ndim == 3
        return chunk_simple_gla(
            q, k, v, scale=1.0, chunk_size=chunk,
            g=decay if per_token else None, g_gamma=None if per_token else decay, **more,
        )[0]  # fmt: skip

    return run


def opennlplab_function(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    from lightning_attn.ops import lightning_attn_func

    slopes = torch.zeros(q.shape[2], device=q.device) if decay is None else -decay
    return lightning_attn_func(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)), slopes
    ).transpose(1, 2)


def participants() -> dict[str, Function]:
    found: dict[str, Function] = {"seqpar": seqpar_function}
    if importlib.util.find_spec("fla"):
        found |= {"fla C=64": fla_function(64), "fla C=128": fla_function(128)}
    if importlib.util.find_spec("lightning_attn"):
        found["OpenNLPLab"] = opennlplab_function
    return found


# -- inputs and clocks ------------------------------------------------------------------------


def make_inputs(batch: int, tokens: int, heads: int) -> tuple[Tensor, ...]:
    shape = (batch, tokens, heads, DIM)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return q * DIM**-0.5, k, v, do


def decay_of(kind: str, batch: int, tokens: int, heads: int) -> Tensor | None:
    """ "lightning": slopes 2^(-8h/H), Qin et al.; "token": log sigmoid around -0.02; "none"."""
    if kind == "lightning":
        return -(2.0 ** (-8.0 * torch.arange(1, heads + 1, device="cuda") / heads)).float()
    if kind == "token":
        gate = torch.randn(batch, tokens, heads, device="cuda") + 4.0
        return torch.nn.functional.logsigmoid(gate)
    return None


def median_ms(run: Callable[[], Any], budget_ms: float = 60.0) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=budget_ms, return_mode="median"))


def graph_of(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same launches without their host time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_tb_per_s() -> float:
    source = torch.randint(0, 99, (2 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e9


def floor_ms(batch: int, tokens: int, heads: int, tensors: int, tb_per_s: float) -> float:
    return tensors * batch * tokens * heads * DIM * 2 / tb_per_s / 1e9


def forward_backward(
    run: Function, inputs: tuple[Tensor, ...], decay: Tensor | None, **more: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two calls to time: forward without a graph for autograd, and backward alone."""
    *leaves, do = inputs
    wanted = [x.detach().requires_grad_() for x in leaves]
    learned = decay
    if decay is not None and decay.ndim == 3:
        learned = decay.detach().requires_grad_()
        wanted.append(learned)
    o = run(*wanted[:3], learned, **more)

    def forward() -> Any:
        with torch.no_grad():
            return run(*leaves, decay, **more)

    return forward, lambda: torch.autograd.grad(o, wanted, do, retain_graph=True)


# -- the parts --------------------------------------------------------------------------------


def measure(
    name: str, run: Function, inputs: tuple[Tensor, ...], kind: str, tb_per_s: float, **more: Any
) -> dict[str, Any]:
    batch, tokens, heads, _ = inputs[0].shape
    decay = more.pop("decay", None)
    if decay is None:
        decay = decay_of(kind, batch, tokens, heads)
    forward, backward = forward_backward(run, inputs, decay, **more)
    slow = name == "OpenNLPLab"
    forward_ms, backward_ms = median_ms(forward), median_ms(backward, 1.0 if slow else 60.0)
    row = {
        "name": name, "shape": [batch, tokens, heads], "decay": kind,
        "forward_ms": forward_ms, "backward_ms": backward_ms,
        "forward_share": floor_ms(batch, tokens, heads, 4, tb_per_s) / forward_ms,
        "backward_share": floor_ms(batch, tokens, heads, 7, tb_per_s) / backward_ms,
    }  # fmt: skip
    if tokens * batch <= 8192 and not slow:
        row["forward_graph_ms"] = median_ms(graph_of(forward))
        row["forward_graph_share"] = (
            floor_ms(batch, tokens, heads, 4, tb_per_s) / row["forward_graph_ms"]
        )
    report(row)
    return row


def report(row: dict[str, Any]) -> None:
    graph = f"  graph {row['forward_graph_ms']:.3f}" if "forward_graph_ms" in row else ""
    print(
        f"{row['name']:<11} {row['shape']!s:<19} {row['decay']:<10} "
        f"forward {row['forward_ms']:8.3f} ms ({row['forward_share']:.2f})  "
        f"backward {row['backward_ms']:8.3f} ms ({row['backward_share']:.2f}){graph}",
        flush=True,
    )


def part_shapes(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    rows = []
    for shape in (*LARGE, SMALL):
        inputs = make_inputs(*shape)
        for kind in ("lightning", "none", "token"):
            for name, run in who.items():
                fla_without = name.startswith("fla") and kind == "none"
                if fla_without or (name == "OpenNLPLab" and kind != "lightning"):
                    continue
                rows.append(measure(name, run, inputs, kind, tb_per_s))
    return rows


def part_packed(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    shape = LARGE[0]
    lengths = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    lengths = (lengths / lengths.sum() * shape[1]).long().clamp(min=1)
    lengths[0] += shape[1] - lengths.sum()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    inputs = make_inputs(*shape)
    rows = []
    for name, run in who.items():
        if name == "OpenNLPLab":
            continue  # takes no packed documents
        given = bounds.long().cuda() if name.startswith("fla") else bounds
        rows.append(measure(name, run, inputs, "lightning", tb_per_s, cu_seqlens=given))
    return [row | {"documents": 64, "longest": int(lengths.max())} for row in rows]


def part_long(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    inputs = make_inputs(*LONG)
    kinds = ("lightning", "none")
    runs = [(name, run) for name, run in who.items() if name == "seqpar"]
    return [measure(name, run, inputs, kind, tb_per_s) for name, run in runs for kind in kinds]


def part_memory(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    rows = []
    for kind in ("lightning", "token"):
        for name, run in who.items():
            if kind == "token" and name == "OpenNLPLab":
                continue
            row = {"name": name, "decay": kind, "extra_share": extra_memory(run, kind)}
            print(f"{name:<11} {kind:<10} extra memory {row['extra_share']:.3f} of q, k, v, o")
            rows.append(row)
    return rows


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


def part_error(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    rows = []
    for kind in ("fixed", "token"):
        inputs = make_inputs(1, 2048, 8)
        decay = torch.linspace(0.0, -0.6931, 8, device="cuda")
        if kind == "token":
            decay = decay * torch.rand(1, 2048, 8, device="cuda") * 2.0
            decay = decay.clamp(min=-0.6931)
        reference = gradients(
            lambda *x: quadratic_attention(*x[:3], log_decay=x[3])[0], inputs, decay
        )
        for name, run in who.items():
            if kind == "token" and name == "OpenNLPLab":
                continue
            ours = gradients(run, inputs, decay)
            errors = {n: relative(ours[n], reference[n]) for n in reference}
            print(f"{name:<11} {kind:<6} " + "  ".join(f"{n} {e:.2e}" for n, e in errors.items()))
            rows.append({"name": name, "decay": kind, "errors": errors})
    return rows


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


def part_cold(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    """Seconds of a first forward and backward in a fresh process with an empty kernel cache."""
    if "seqpar" not in who:
        return []
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
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    seconds = float(done.stdout.split()[-1])
    print(f"cold start of forward and backward: {seconds:.1f} s")
    return [{"name": "seqpar", "cold_start_s": seconds}]


def part_lengths(tb_per_s: float, who: dict[str, Function]) -> list[dict[str, Any]]:
    rows = []
    for exponent in (11, 13, 15, 17, 19):
        inputs = make_inputs(1, 1 << exponent, 16)
        for name, run in who.items():
            if name == "OpenNLPLab" and exponent > 17:
                continue
            rows.append(measure(name, run, inputs, "lightning", tb_per_s))
    return rows


# -- the run ----------------------------------------------------------------------------------


def hardware() -> tuple[str, dict[str, Any]]:
    import triton

    name = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if importlib.util.find_spec("fla"):
        from importlib.metadata import version

        versions["fla-core"] = version("fla-core")
    about = {
        "device": name, "python": platform.python_version(), "versions": versions,
        "commit": os.environ.get("SEQPAR_COMMIT", commit),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "head_dim": DIM, "dtype": "bfloat16",
    }  # fmt: skip
    return name.lower().replace("nvidia ", "").replace(" ", "-"), about


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per token and head against length, forward and backward, all participants."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    names = list(dict.fromkeys(row["name"] for row in results["lengths"]))
    for axis, way, tensors in ((axes[0], "forward", 4), (axes[1], "backward", 7)):
        for name in names:
            rows = [row for row in results["lengths"] if row["name"] == name]
            tokens = [row["shape"][1] for row in rows]
            per_token = [1e6 * r[f"{way}_ms"] / (r["shape"][1] * r["shape"][2]) for r in rows]
            axis.plot(tokens, per_token, marker="o", markersize=3, label=name)
        floor = tensors * DIM * 2 / results["copy_tb_per_s"] / 1e3
        axis.axhline(floor, color="grey", linestyle=":", label="memory floor")
        axis.set(xscale="log", yscale="log", title=way, xlabel="tokens (16 heads, D = 128, bf16)")
    axes[0].set_ylabel("ns per token and head")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--plot", action="store_true", help="draw the plot from the JSON file")
    options = parser.parse_args()
    if options.plot:
        path = options.output or ROOT / "benchmarks/results/h200/lightning.json"
        plot(json.loads(path.read_text()), ROOT / "docs/plots/lightning.svg")
        return
    folder, about = hardware()
    path = options.output or ROOT / f"benchmarks/results/{folder}/lightning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rates = [copy_tb_per_s() for _ in range(3)]
    results: dict[str, Any] = {**about, "copy_tb_per_s": statistics.median(rates)}
    print(
        f"{about['device']}: copy {results['copy_tb_per_s']:.2f} TB/s; with {list(participants())}"
    )
    everyone = participants()
    peers = {name: run for name, run in everyone.items() if name != "seqpar"}
    for who in ({"seqpar": everyone["seqpar"]}, peers):  # peers tune themselves for minutes
        for part in options.only:
            rows = globals()[f"part_{part}"](results["copy_tb_per_s"], who)
            results[part] = results.get(part, []) + rows
            torch.cuda.empty_cache()
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
