"""What README and docs show, runs: every Python block, and every link leads somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqpar.models import Decoder, hybrid
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", README_BLOCKS, ids=["wrap", "plan"])
def test_readme_block_runs(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block)
    command = [sys.executable, str(script)]
    if "init_mesh" in block:
        launch = [sys.executable, "-m", "seqpar.cli", "launch", "--nproc", "2"]
        command = [*launch, "--set", "allow_oversubscribe=true", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "divergence=None" in done.stdout or "over the optimum" in done.stdout


def _train_as_the_page_says(rank: int, block: str, folder: Path) -> list[list[int]]:
    os.chdir(folder)
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "hidden": 48, "softmax_every": 2}
    softmax = {"softmax_heads": 4, "softmax_kv_heads": 2, "softmax_head_dim": 8}
    given = {
        "model": Decoder(hybrid(vocab_size=64, **sizes, **softmax)),
        "device": torch.device("cpu"),
        "vocab_size": 64,
        "memory_bytes": 2.0**30,
        "documents": [torch.randint(64, (tokens,)) for tokens in range(3, 900, 30)],
        "num_steps": 2,
    }
    exec(block, {**given, "checkpoint_position": 0, "checkpoint_step": 0})
    return [json.loads(line)["documents"] for line in Path("plans.jsonl").open()]


def test_planned_training_of_the_planning_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "planning.md").read_text()
    plan, train = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(plan, {})
    steps = run_ranks(2, _train_as_the_page_says, train, tmp_path)[0]
    assert len(steps) == 2
    assert sorted(steps[0][:30]) == list(range(30)), "an epoch holds each document once"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]+`", "", page.read_text())
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_docs_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block, str(page), "exec")


def test_the_changelog_and_the_package_agree_on_the_version() -> None:
    import seqpar

    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == seqpar.__version__
    assert f'version = "{seqpar.__version__}"' in (ROOT / "pyproject.toml").read_text()
