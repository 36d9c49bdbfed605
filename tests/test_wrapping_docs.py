"""docs/wrapping.md runs as it stands, on two ranks; docs/models.md says what the tests show."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

from seqpar.commands.check import command
from tests.ranks import run_ranks
from tests.support_table import PAGE, page_with, table

pytest.importorskip("transformers")

WRAPPING = Path(__file__).parent.parent / "docs" / "wrapping.md"


def _blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", WRAPPING.read_text(), re.DOTALL | re.MULTILINE)


def _own_model(folder: Path) -> list[str]:
    """Saves the block of one's own model as the page says; the others."""
    (model,) = (block for block in _blocks() if "def build()" in block)
    (folder / "my_model.py").write_text(model)
    return [block for block in _blocks() if block != model]


def _run(rank: int, blocks: list[str], folder: Path) -> list[str]:
    warnings.simplefilter("ignore")  # other packages' notices
    sys.path.insert(0, str(folder))  # where a script lies, its imports are found
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(WRAPPING), "exec"), names)
    return sorted(names)


def test_the_page_on_wrapping_runs(tmp_path: Path) -> None:
    for names in run_ranks(2, _run, _own_model(tmp_path), tmp_path):
        assert {"report", "targets", "own", "tokens"} <= set(names)


def test_the_page_s_own_model_passes_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a newcomer would: save the block as my_model.py, run the command in that folder."""
    _own_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "\nseqpar check my_model:build\n" in WRAPPING.read_text()
    command("my_model:build")
    assert capsys.readouterr().out.startswith("my_model:build: loss ")


def test_the_table_of_models_is_the_tests_own() -> None:
    assert page_with(table()) == PAGE.read_text(), "run python -m tests.support_table"
