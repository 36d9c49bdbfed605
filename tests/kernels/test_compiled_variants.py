"""Lengths that no batch had before run on kernels that are compiled already."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def test_new_lengths_ask_for_no_new_variants() -> None:
    """Each variant takes a second to compile, and every batch of documents brings new lengths."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_variants"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert 0 < found["calibration"] <= 28
    assert found["new_lengths"] == 0
