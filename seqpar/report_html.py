"""report.html: one file with its pictures inside.

Takes the dictionary of report.json, so that a page can be made again from the file alone.
"""

from __future__ import annotations

import html
import io
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seqpar.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["render"]

_DEGREE_COLOURS = {1: "#4c9f70", 2: "#3b7ea1", 4: "#d1803a", 8: "#a4508b", 16: "#5b5b5b"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
svg {{ width: 100%; height: auto; }}
footer {{ color: #666; font-size: .85rem; margin-top: 2rem; }}
</style></head><body>
<h1>{title}</h1>
{summary}
<h2>Loss</h2>{loss}
<h2>One step, planned and measured</h2>
<p>{gantt_caption}</p>{gantt}
<h2>Documents</h2>{lengths}
<h2>Steps</h2>{steps}
<footer>{footer}</footer>
</body></html>
"""


def render(report: dict[str, Any]) -> str:
    """The page for one run's report (the dictionary of report.json).

    Raises:
        MissingExtraError: matplotlib, which draws the pictures, is not installed.
    """
    step = max(report["steps"], key=lambda s: len({g["degree"] for g in _groups(s)}))
    return _PAGE.format(
        title=html.escape(f"seqpar run: {report['name']}"),
        summary=_summary(report),
        loss=_picture(lambda axes: _draw_loss(axes, report), height=3.2),
        gantt=_picture(lambda axes: _draw_gantt(axes, step, report["ranks"]), height=3.6),
        gantt_caption=html.escape(
            f"Step {step['step']}: {step['documents']} documents, {step['tokens']:,} tokens. "
            "Upper half of each rank's row: the plan. Lower half: as measured."
        ),
        lengths=_picture(lambda axes: _draw_lengths(axes, report["document_lengths"]), height=3.0),
        steps=_steps_table(report),
        footer=html.escape(f"versions: {report['versions']}; hardware: {report['hardware']}"),
    )


def _summary(report: dict[str, Any]) -> str:
    comparison = report["comparison"]
    against = (
        f"{report['speedup_over_fixed_degree']:.2f} times as fast as degree "
        f"{comparison['fixed_degree']} for all, on {comparison['batches']} of its batches"
        if comparison["batches"]
        else "not compared: one rank has one degree"
    )
    rows = {
        "Held-out loss": f"{report['heldout_loss_first']:.3f} → "
        f"{report['heldout_loss_last']:.3f} nats a byte",
        "Parity with one process": f"relative error {report['parity_relative_error']:.1e}",
        "Against the best fixed degree": against,
        "Step times, predicted": f"off by {report['prediction_error']:.0%} on average",
        "Planning": _planning(report["steps"]),
        "Ranks": f"{report['ranks']} on {report['device']}",
        "Wall time": f"{report['wall_s']:.0f} s",
    }
    return _table([(html.escape(k), html.escape(v)) for k, v in rows.items()])


def _planning(steps: Sequence[dict[str, Any]]) -> str:
    """What plans took beside the steps, and what the steps waited for them."""
    took = statistics.median(s["plan_ms"] for s in steps)
    first = steps[0]["plan_wait_ms"]
    said = f"{took:,.0f} ms a step, beside the steps; the first waited {first:,.0f} ms"
    rest = [s["plan_wait_ms"] for s in steps[1:]]
    return said + (f", no other over {max(rest):,.1f} ms" if rest else "")


def _steps_table(report: dict[str, Any]) -> str:
    head = ("step", "loss", "documents", "tokens", "groups by degree", "predicted", "measured")
    rows = [
        (
            str(s["step"]),
            f"{s['loss']:.3f}",
            str(s["documents"]),
            f"{s['tokens']:,}",
            html.escape(_mix(s)),
            f"{s['predicted_ms']:,.0f} ms",
            f"{s['measured_ms']:,.0f} ms",
        )
        for s in report["steps"]
    ]
    return _table(rows, head)


def _mix(step: dict[str, Any]) -> str:
    counts = Counter(group["degree"] for group in _groups(step))
    return ", ".join(f"{counts[degree]} x {degree}" for degree in sorted(counts))


def _groups(step: dict[str, Any]) -> list[dict[str, Any]]:
    return [g for micro_batch in step["plan"]["micro_batches"] for g in micro_batch["groups"]]


def _table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _picture(draw: Any, *, height: float) -> str:
    """An inline SVG of one set of axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing report.html") from error
    figure: Figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_loss(axes: Axes, report: dict[str, Any]) -> None:
    steps = report["steps"]
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], ".-", label="training")
    axes.plot(*zip(*report["heldout"], strict=True), "s--", color="#d1803a", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a byte")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_gantt(axes: Axes, step: dict[str, Any], ranks: int) -> None:
    """Each rank's row: its planned groups above, the same groups as measured below."""
    planned_start = 0.0
    used = set()
    for index, micro_batch in enumerate(step["plan"]["micro_batches"]):
        for group, (start, stop) in zip(
            micro_batch["groups"], step["group_spans_ms"][index], strict=True
        ):
            colour = _DEGREE_COLOURS.get(group["degree"], "#888888")
            used.add((group["degree"], colour))
            for rank in group["ranks"]:
                for offset, left, width, alpha in (
                    (-0.2, planned_start, group["predicted_ms"], 1.0),
                    (0.2, start, stop - start, 0.65),
                ):
                    axes.barh(
                        rank + offset,
                        width,
                        left=left,
                        height=0.36,
                        color=colour,
                        alpha=alpha,
                        edgecolor="white",
                    )
        planned_start += micro_batch["makespan_ms"]
    for degree, colour in sorted(used):
        axes.barh(0, 0, color=colour, label=f"degree {degree}")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_lengths(axes: Axes, lengths: list[int]) -> None:
    halves = range(2 * (min(lengths).bit_length() - 1), 2 * (max(lengths) - 1).bit_length() + 1)
    bins = [2.0 ** (half / 2) for half in halves]
    axes.hist(lengths, bins=bins, color="#3b7ea1", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
