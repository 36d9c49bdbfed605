"""Draw the exchange model: time against ranks and against tokens per rank, measured points on it.

python -m seqpar.planners.exchange_plot docs/state-exchange.svg --measured state.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from seqpar.errors import MissingExtraError
from seqpar.planners.exchange import (
    INFINIBAND_NDR,
    NAMES,
    NVLINK_H200,
    PEERS_H200,
    ExchangeProblem,
    Link,
    exchange_ms,
)

__all__ = ["plot_exchanges"]

HEADS, DIM = 32, 128
PEERS = "all_gather, peers"
"""Of benchmarks/bench_state.py: `comm.share_memory` in force. Drawn dashed, up to 8 ranks."""
LAYER = ExchangeProblem(
    world_size=2,
    reach=1,
    state_bytes=HEADS * DIM * DIM * 4,
    tokens=8192,
    token_bytes=HEADS * 4 * DIM * 2,
    heads=HEADS,
)
"""One row of a stream, H = 32, D = 128, bfloat16 tokens, float32 states, no decay."""

COLOURS = dict(
    zip(NAMES, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"), strict=True)
)


def plot_exchanges(path: Path, *, measured: Path | None = None) -> None:
    """Write the four panels, NVLink and InfiniBand by ranks and by tokens, to an image file.

    Args:
        path: where; the suffix says the format (svg, png, pdf).
        measured: `state.json` of benchmarks/bench_state.py; its exchange times become points.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing the exchange model") from None
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    points = [] if measured is None else json.loads(measured.read_text())["exchange_ms"]
    for row, (link, world_size) in enumerate(((NVLINK_H200, 8), (INFINIBAND_NDR, 64))):
        _by_ranks(panels[row][0], link, points if row == 0 else [])
        _by_tokens(panels[row][1], link, world_size)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path)


def _by_ranks(panel: Any, link: Link, points: list[dict[str, Any]]) -> None:
    ranks = [2**power for power in range(1, 11)]
    for name in NAMES:
        times = [exchange_ms(name, replace(LAYER, world_size=w, reach=w - 1), link) for w in ranks]
        panel.plot(ranks, times, label=name, color=COLOURS[name])
    if link is NVLINK_H200:
        layers = [replace(LAYER, world_size=w, reach=w - 1) for w in ranks[:3]]
        times = [exchange_ms("all_gather", layer, PEERS_H200) for layer in layers]
        panel.plot(ranks[:3], times, "--", label=PEERS, color=COLOURS["all_gather"])
    for point in points:
        if point["state_bytes"] == LAYER.state_bytes:
            for name in NAMES:
                if name in point:
                    panel.plot([2], [point[name]], "o", color=COLOURS[name])
            if PEERS in point:
                panel.plot([2], [point[PEERS]], "s", mfc="none", color=COLOURS["all_gather"])
    _dress(panel, f"{link.name}: 2 MiB of state, 8,192 tokens a rank", "ranks")


def _by_tokens(panel: Any, link: Link, world_size: int) -> None:
    tokens = [2**power for power in range(7, 19)]
    for name in NAMES:
        layer = replace(LAYER, world_size=world_size, reach=world_size - 1)
        times = [exchange_ms(name, replace(layer, tokens=t), link) for t in tokens]
        panel.plot(tokens, times, color=COLOURS[name])
    _dress(panel, f"{link.name}: {world_size} ranks", "tokens a rank")


def _dress(panel: Any, title: str, xlabel: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(xlabel)
    panel.set_ylabel("one exchange, ms")
    panel.grid(alpha=0.3)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the exchange model.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--measured", type=Path)
    options = parser.parse_args(arguments)
    plot_exchanges(options.path, measured=options.measured)


if __name__ == "__main__":
    main()
