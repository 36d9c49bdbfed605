"""The page is whole in itself and can be made again from report.json alone."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from seqpar.errors import MissingExtraError
from seqpar.report import DegreeComparison, hardware, versions
from seqpar.report_html import render


def _report(lengths: list[int]) -> dict[str, Any]:
    groups = [
        {"ranks": [0, 1], "degree": 2, "sequences": [0], "predicted_ms": 9.0},
        {"ranks": [2], "degree": 1, "sequences": [1], "predicted_ms": 4.0},
    ]
    step = {
        "step": 0,
        "loss": 2.5,
        "tokens": 1234,
        "documents": 2,
        "plan": {"micro_batches": [{"makespan_ms": 9.0, "groups": groups}]},
        "predicted_ms": 9.0,
        "measured_ms": 10.0,
        "group_spans_ms": [[[0.0, 9.5], [0.1, 5.0]]],
        "plan_ms": 42.0,
        "plan_wait_ms": 17.0,
    }
    return {
        "name": "a <run>",
        "heldout_loss_first": 5.5,
        "heldout_loss_last": 2.5,
        "heldout": [[0, 5.5], [1, 2.5]],
        "parity_relative_error": 1e-6,
        "speedup_over_fixed_degree": 1.25,
        "prediction_error": 0.1,
        "comparison": {"fixed_degree": 2, "batches": 1},
        "ranks": 4,
        "device": "cpu",
        "wall_s": 61.0,
        "document_lengths": lengths,
        "steps": [step],
        "versions": versions(),
        "hardware": hardware(),
    }


@pytest.mark.parametrize("lengths", [[7], [1, 1], [3, 800, 32768], [1, 33000]])
def test_the_page_holds_its_pictures_and_figures(lengths: list[int]) -> None:
    page = render(json.loads(json.dumps(_report(lengths))))
    assert page.count("<svg") == page.count("</svg>") == 3
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "a &lt;run&gt;" in page
    assert "<script" not in page
    for shown in (
        "5.500 → 2.500",
        "1.25 times",
        "1 x 1, 1 x 2",
        "1,234",
        "off by 10%",
        "the first waited 17 ms",
    ):
        assert shown in page


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"seqpar\[plot\]"):
        render(_report([3]))


def test_speedup_is_total_over_total() -> None:
    comparison = DegreeComparison(
        fixed_degree=4, batches=2, planned_ms=(10.0, 30.0), fixed_ms=(20.0, 40.0)
    )
    assert comparison.speedup == 1.5
    nothing = DegreeComparison(fixed_degree=1, batches=0, planned_ms=(), fixed_ms=())
    assert nothing.speedup == 1.0
