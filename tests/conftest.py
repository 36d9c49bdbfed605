"""One thread a process, fresh memory filled with NaN, and skips that say their reason."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "CUDA_VISIBLE_DEVICES" not in os.environ and not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # no GPU: Triton kernels run interpreted

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    count = torch.cuda.device_count()
    for item in items:
        if "gpu" in item.keywords and count < 1:
            item.add_marker(pytest.mark.skip(reason="needs one CUDA device"))
        if "multigpu" in item.keywords and count < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA devices, found {count}"))


@pytest.fixture(autouse=True)
def _nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
