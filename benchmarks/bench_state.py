"""Chunked-state sequence parallelism against the local kernel, its exchanges and its peers.

    torchrun --nproc-per-node 2 benchmarks/bench_state.py --tokens 8192 65536
    torchrun ... benchmarks/bench_state.py --lasp CHECKOUT   # also OpenNLPLab/LASP, from a checkout

Forward and backward of one layer, H = 32, D = 128, bfloat16; results against one device; the
exchanges alone: in order of worth, so that a run that is cut short has what matters. A time is the
slowest rank's, the median of rounds in which forms take turns, so that their ratios are of one run;
those that take many times as long as the local kernel take turns after the others.

Legend: T tokens of one rank, W ranks, H heads, D key and value dim.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from state_check import check
from state_exchanges import time_state_exchanges, time_token_exchanges
from state_lasp import lasp_forms
from state_timing import Setup, Times, forward_backward, graphed, take_turns
from torch import Tensor

from seqpar import comm
from seqpar.kernels.lightning import lightning_attention
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops.state import explain_exchange, state_attention
from seqpar.ops.state_exchange import EXCHANGES


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hang-limit", type=float, help="s; say where it stands then, and end")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536], help="per rank")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decays", nargs="+", default=["slopes", "no decay"])
    parser.add_argument("--forms", nargs="+", help="only these forms, and the local kernel")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    parser.add_argument("--exchanges-only", action="store_true", help="time no layer")
    parser.add_argument("--time-limit", type=float, default=1e9, help="s; begin nothing after it")
    parser.add_argument("--quick", action="store_true", help="check and time less")
    parser.add_argument("--over-nccl", action="store_true", help="let no peer read memory")
    parser.add_argument("--lasp", type=Path, help="a checkout of OpenNLPLab/LASP to measure too")
    parser.add_argument("--out", type=Path, help="folder for state.json")
    options = parser.parse_args(arguments)
    if options.hang_limit:
        faulthandler.dump_traceback_later(options.hang_limit, exit=True)
    setup = _setup(options)
    folder = options.out or Path("benchmarks/results") / _hardware(setup)["folder"]
    results: dict[str, Any] = {"hardware": _hardware(setup), "world_size": setup.world_size}
    every = ["slopes", "none", "fast", "per token"]
    every_exchange = ["auto", *EXCHANGES, "all_to_all"]
    if options.check_only:
        check(setup, every, every_exchange)
        dist.destroy_process_group()
        return 0
    for name, part in _parts(setup, options, results, every, every_exchange):
        if _time_is_up(setup, start + options.time_limit):
            setup.say(f"left out, the time is up: {name}")
            continue
        _keep(setup, folder, results, **part())
        setup.say(f"[{time.monotonic() - start:.0f} s]")
    gc.collect()  # graphs that hold NCCL's kernels: with one alive the group does not end
    dist.destroy_process_group()
    return 0


Part = tuple[str, Callable[[], dict[str, Any]]]


def _parts(
    setup: Setup,
    options: argparse.Namespace,
    results: dict[str, Any],
    every: list[str],
    every_exchange: list[str],
) -> list[Part]:
    """What a run does, in order of worth: what does not fit into the time is at the end."""
    decays = {"slopes": setup.slopes(), "no decay": None}

    def layer(name: str, tokens: int) -> dict[str, Any]:
        rows = time_layer(setup, tokens, name, decays[name], None, options.forms)
        return {"layer": results.get("layer", []) + rows}

    def peers(name: str, tokens: int) -> dict[str, Any]:
        rows = time_layer(setup, tokens, name, decays[name], options.lasp, None)
        return {"peers": results.get("peers", []) + rows}

    exchanges: Part = ("exchanges", partial(_exchanges, setup, options.heads))
    if options.exchanges_only:
        return [exchanges]
    parts: list[Part] = []
    cases = list(itertools.product(options.decays, options.tokens))
    for name, tokens in cases:
        parts.append((f"{name}, {tokens} tokens", partial(layer, name, tokens)))
    quick = partial(check, setup, ["slopes"], ["auto", "all_gather"])
    parts.append(("check", lambda: {"errors": quick()}))
    for name, tokens in cases if options.lasp else ():
        parts.append((f"peers, {name}, {tokens} tokens", partial(peers, name, tokens)))
    parts.append(exchanges)
    if not options.quick:
        parts.append(("check all", lambda: {"errors": check(setup, every, every_exchange)}))
    return parts


def _exchanges(setup: Setup, heads: int) -> dict[str, Any]:
    return {
        "exchange_ms": time_state_exchanges(setup, [heads, 512]),
        "token_exchange_ms": time_token_exchanges(setup, [256, 1024, 8192, 65536]),
    }


def _time_is_up(setup: Setup, until: float) -> bool:
    """Whether it is on any rank: all of them stop together."""
    late = torch.tensor([time.monotonic() > until], device=setup.device)
    return bool(comm.all_gather(late, setup.group).any())


def _keep(setup: Setup, folder: Path, results: dict[str, Any], **found: Any) -> None:
    """Write what is known so far: a run that is stopped leaves what it had."""
    results.update(found)
    if setup.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps(results, indent=1) + "\n")


def _setup(options: argparse.Namespace) -> Setup:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    group = init_mesh(sp=world_size, share_memory=not options.over_nccl)["sp"].get_group()
    pool = GroupPool(share_memory=False)
    pool.prepare([tuple(range(world_size))])
    cuda = torch.cuda.is_available()
    return Setup(
        group=group,
        nccl_group=pool.group(range(world_size)) if comm.shares_memory(group) else group,
        rank=dist.get_rank(group),
        world_size=world_size,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        dtype=torch.bfloat16,
        heads=options.heads,
        dim=options.dim,
        rounds=options.rounds,
    )


def _hardware(setup: Setup) -> dict[str, Any]:
    cuda = setup.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "cpu"
    return {
        "folder": f"{name.lower().replace('nvidia ', '').replace(' ', '-')}-x{setup.world_size}",
        "device": name,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    }


# -- one layer, forward and backward ----------------------------------------------------------


def time_layer(
    setup: Setup,
    tokens: int,
    decay_name: str,
    decay: Tensor | None,
    lasp: Path | None,
    only: list[str] | None,
) -> list[dict[str, Any]]:
    """Forward and backward of every form, and its ratio to the local kernel.

    With `lasp`, of the peers: its rings where there is a decay, and gathering all tokens.
    """
    layout = SequenceLayout.contiguous((0, tokens * setup.world_size), setup.world_size)
    *inputs, do = setup.stream(tokens)
    leaves = [x.requires_grad_() for x in inputs]
    q, k, v = leaves

    def scattered(exchange: str, **options: Any) -> Callable[[], Tensor]:
        common = {"log_decay": decay, "layout": layout, "group": setup.group, **options}
        return lambda: state_attention(q, k, v, **common, exchange=exchange)[0]

    outputs: dict[str, Callable[[], Tensor]] = {
        "local kernel": lambda: lightning_attention(q, k, v, log_decay=decay)[0],
        "auto": scattered("auto", check=False),
        "auto, checked": scattered("auto"),
        "auto, NCCL": scattered("auto", check=False, group=setup.nccl_group),
        "auto, overlapped": scattered("auto", check=False, overlap=True),
        "all_gather": scattered("all_gather", check=False),
        "all_gather, nothing left out": scattered("all_gather", check=False, truncate=False),
        "chain": scattered("chain", check=False),
        "pipelined_chain": scattered("pipelined_chain", check=False),
        "log_step": scattered("log_step", check=False),
        "all_to_all": scattered("all_to_all", check=False),
        "gather, then compute": _gather_then_compute(setup, leaves, decay),
    }
    forms = {name: forward_backward(output, leaves, do) for name, output in outputs.items()}
    if only is not None:
        forms = {name: form for name, form in forms.items() if name in ("local kernel", *only)}
    slow: dict[str, Callable[[], None]] = {}
    rings: dict[str, Callable[[], None]] = {}
    if lasp is not None:
        forms = {name: forms[name] for name in ("local kernel", "auto", "gather, then compute")}
        rings = lasp_forms(setup, lasp, leaves, do, decay) if decay is not None else {}
    if (name := "gather, then compute") in forms:
        slow[name] = forms.pop(name)
    setup.say(
        f"\n{tokens} tokens a rank, {setup.world_size} ranks, decay: {decay_name}; "
        f"forward and backward, ms (ratio to the local kernel)"
    )
    setup.say(str(explain_exchange(q, k, v, log_decay=decay, layout=layout, group=setup.group)))
    # Apart: who follows 50 ms of a peer that leaves the device half idle finds it cool.
    times = take_turns(setup, forms) | take_turns(setup, slow | rings)
    setup.say("  eager: " + ", ".join(f"{name} {t.ms:.3f}" for name, t in times.items()))
    # And no rings, which send from Python.
    graph_times = take_turns(setup, graphed(setup, forms)) | take_turns(setup, graphed(setup, slow))
    rows = []
    for name, time_ in times.items():
        with comm.count_traffic() as traffic:
            (forms | slow | rings)[name]()
        graph = graph_times.get(name)
        row = {
            "tokens": tokens,
            "decay": decay_name,
            "form": name,
            "ms": time_.ms,
            "host_ms": time_.host_ms,
            "ratio": time_.ms / times["local kernel"].ms,
            "graph_ms": graph.ms if graph else None,
            "graph_ratio": _ratio(graph, graph_times),
            "received_bytes": traffic.received_bytes,
            "saved_bytes": traffic.saved_bytes,
        }
        rows.append(row)
        setup.say(_line(row))
    return rows


def _ratio(times: Times | None, every: dict[str, Times]) -> float | None:
    """To the local kernel, where both were captured."""
    if times is None or "local kernel" not in every:
        return None
    return times.ms / every["local kernel"].ms


def _line(row: dict[str, Any]) -> str:
    graph = ""
    if row["graph_ms"] is not None:
        graph = f", in a graph {row['graph_ms']:.3f} ({row['graph_ratio'] or 0:.3f})"
    return (
        f"  {row['form']:30} {row['ms']:9.3f} ({row['ratio']:.3f})  host {row['host_ms']:.3f}"
        f"{graph}, rank 0 received {row['received_bytes'] / 2**20:.1f} MiB"
    )


class _GatherTokens(torch.autograd.Function):
    """[1, T, H, D] of every rank to [1, N, H, D]; backward sums over ranks and takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return comm.all_gather(x, group).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(dx.chunk(ctx.group.size(), 1)[0])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own.view(-1), dx.contiguous().view(-1), group=ctx.group)
        return own, None


def _gather_then_compute(
    setup: Setup, leaves: list[Tensor], decay: Tensor | None
) -> Callable[[], Tensor]:
    """The plain form: every rank gathers the stream, computes all of it and keeps its tokens."""

    def run() -> Tensor:
        whole = [_GatherTokens.apply(x, setup.group) for x in leaves]
        o, _ = lightning_attention(*whole, log_decay=decay)
        return o.chunk(setup.world_size, 1)[setup.rank]

    return run


if __name__ == "__main__":
    raise SystemExit(main())
