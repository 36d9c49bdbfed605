"""Draw the exchange model: time against ranks and against tokens per rank, measured points on it.

python -m seqpar.planners.exchange_plot docs/state-exchange.svg \\
    --measured benchmarks/results/h200-x2/state.json benchmarks/results/h200-x4/state.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
) | {PEERS: "tab:blue"}


def plot_exchanges(path: Path, *, measured: Sequence[Path] = ()) -> None:
    """Write six panels, NVLink above and InfiniBand below, by ranks and by tokens, to an image.

    Args:
        path: where; the suffix says the format (svg, png, pdf).
        measured: files `state.json` of benchmarks/bench_state.py, one for each number of ranks;
            their exchange times become points. In an svg, points and lines say their values as ids.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing the exchange model") from None
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True)
    points = [point for file in measured for point in _points(json.loads(file.read_text()))]
    for row, (link, few, many) in enumerate(((NVLINK_H200, 2, 8), (INFINIBAND_NDR, 8, 64))):
        seen = points if link is NVLINK_H200 else []
        _by_ranks(panels[row][0], link, [point for point in seen if point.tokens == LAYER.tokens])
        for panel, ranks in ((panels[row][1], few), (panels[row][2], many)):
            _by_tokens(panel, link, ranks, [point for point in seen if point.ranks == ranks])
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@dataclass(frozen=True)
class _Point:
    """One exchange, measured over NVLink."""

    name: str
    ranks: int
    tokens: int
    ms: float


def _points(results: dict[str, Any]) -> list[_Point]:
    """Of a state.json: states of the drawn layer's size, and tokens by their number."""
    ranks = results["world_size"]
    states = [row for row in results["exchange_ms"] if row["state_bytes"] == LAYER.state_bytes]
    rows = [(LAYER.tokens, row) for row in states]
    rows += [(row["tokens"], row) for row in results.get("token_exchange_ms", [])]
    return [
        _Point(name, ranks, tokens, row[name])
        for tokens, row in rows
        for name in (*NAMES, PEERS)
        if name in row
    ]


def _by_ranks(panel: Any, link: Link, points: list[_Point]) -> None:
    ranks = [2**power for power in range(1, 11)]
    layers = [replace(LAYER, world_size=w, reach=w - 1) for w in ranks]
    for name in NAMES:
        _line(panel, name, ranks, [exchange_ms(name, layer, link) for layer in layers], link)
    if link is NVLINK_H200:
        times = [exchange_ms("all_gather", layer, PEERS_H200) for layer in layers[:3]]
        _line(panel, PEERS, ranks[:3], times, PEERS_H200)
    for point in points:
        _dot(panel, point, point.ranks)
    _dress(panel, f"{link.name}: 2 MiB of state, 8,192 tokens a rank", "ranks")


def _by_tokens(panel: Any, link: Link, world_size: int, points: list[_Point]) -> None:
    tokens = [2**power for power in range(7, 19)]
    layer = replace(LAYER, world_size=world_size, reach=world_size - 1)
    for name in NAMES:
        times = [exchange_ms(name, replace(layer, tokens=t), link) for t in tokens]
        _line(panel, name, tokens, times, link)
    for point in points:
        _dot(panel, point, point.tokens)
    _dress(panel, f"{link.name}: {world_size} ranks", "tokens a rank")


def _line(panel: Any, name: str, xs: list[int], times: list[float], link: Link) -> None:
    style = "--" if name == PEERS else "-"
    said = f"model: {name}, {link.name}, at {xs[-1]} {times[-1]:.4f} ms"
    panel.plot(xs, times, style, label=name, color=COLOURS[name], gid=said)


def _dot(panel: Any, point: _Point, x: int) -> None:
    hollow = {"marker": "s", "mfc": "none"} if point.name == PEERS else {"marker": "o"}
    said = f"measured: {point.name}, {point.ranks} ranks, {point.tokens} tokens, {point.ms:.4f} ms"
    panel.plot([x], [point.ms], color=COLOURS[point.name], gid=said, **hollow)


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
    parser.add_argument("--measured", type=Path, nargs="+", default=[])
    options = parser.parse_args(arguments)
    plot_exchanges(options.path, measured=options.measured)


if __name__ == "__main__":
    main()
