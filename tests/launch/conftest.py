"""Small torch.distributed scripts, written where a test runs, and a launcher of its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]

GRACE_S = 8.0
"""Ray's own processes end by themselves, some seconds after the launcher."""

PRELUDE = """
import os, signal, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
total = torch.ones(1)
dist.all_reduce(total)
"""


@pytest.fixture
def write_script(tmp_path: Path) -> Callable[[str], Path]:
    """Write a script of ranks that starts with gloo up and `rank`, `world`, `total` known."""

    def write(body: str, *, name: str = "train.py") -> Path:
        path = tmp_path / name
        path.write_text(PRELUDE + textwrap.dedent(body) + "\ndist.destroy_process_group()\n")
        return path

    return write


@pytest.fixture
def seqpar(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in its own process, in the test's folder; nothing may outlive it."""

    def run(*arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        before = set(psutil.pids())
        environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), COLUMNS="200")
        outcome = subprocess.run(
            [sys.executable, "-m", "seqpar.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        deadline = time.monotonic() + GRACE_S
        while left := left_behind(before, tmp_path):
            assert time.monotonic() < deadline, (left, outcome.stderr)
            time.sleep(0.1)
        return outcome

    return run


def left_behind(before: set[int], folder: Path) -> list[str]:
    """Processes started since `before` that work in the folder or run its scripts."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        if process.pid in before or process.info["cmdline"] is None:
            continue
        words = " ".join(process.info["cmdline"])
        if str(folder) in words or process.info["cwd"] == str(folder):
            found.append(words)
    return found
