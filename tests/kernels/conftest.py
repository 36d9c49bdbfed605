"""The public functions of the kernels, made to run in Triton with or without a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from seqpar.kernels.lightning.plan import Plan


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device where public functions run in Triton: interpreted, if there is no GPU."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported")
    made = Plan.__init__

    def on_triton(self: Plan, problem: Any) -> None:
        made(self, problem)
        self.on_triton = min(problem.batch, problem.tokens, problem.heads) > 0

    monkeypatch.setattr(Plan, "__init__", on_triton)
    return "cpu"
