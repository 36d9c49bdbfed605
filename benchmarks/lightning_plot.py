"""The plot of docs/lightning.md, from what bench_lightning has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.lightning_peers import DIM

__all__ = ["plot"]


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
        axis.set(xscale="log", yscale="log", title=way, xlabel="tokens (32 heads, D = 128, bf16)")
    axes[0].set_ylabel("ns per token and head")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
