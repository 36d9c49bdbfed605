"""The LM head's loss, forward and backward: time and memory of each implementation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.wrapped import Machine
from seqpar.head_loss import _liger_installed, lm_head_loss_sum
from seqpar.loss import token_loss_sum

TOKENS, HIDDEN = 32768, 2048
VOCABULARIES = (32768, 131072)


def head(machine: Machine) -> dict[str, Any]:
    """bf16 hidden states of 32,768 tokens, 2,048 wide, by size of the vocabulary."""
    if not machine.cuda:
        return {"left_out": "peak memory is read on CUDA only"}
    found: dict[str, Any] = {"tokens": TOKENS, "hidden": HIDDEN}
    for vocabulary in VOCABULARIES:
        generator = torch.Generator(machine.device).manual_seed(0)
        options = {"device": machine.device, "generator": generator}
        hidden = torch.randn(TOKENS, HIDDEN, **options).bfloat16().requires_grad_()  # type: ignore[arg-type]
        weight = (0.02 * torch.randn(vocabulary, HIDDEN, **options)).bfloat16().requires_grad_()  # type: ignore[arg-type]
        labels = torch.randint(vocabulary, (TOKENS,), **options)  # type: ignore[arg-type]
        ways = {
            "logits": lambda h, w, x: token_loss_sum(h @ w.T, x)[0],
            "seqpar": lambda h, w, x: lm_head_loss_sum(h, w, x, implementation="seqpar")[0],
        }
        if _liger_installed():
            ways["liger"] = lambda h, w, x: lm_head_loss_sum(h, w, x, implementation="liger")[0]
        found[f"vocabulary_{vocabulary}"] = {
            name: _measured(machine, way, hidden, weight, labels) for name, way in ways.items()
        }
    return found


def _measured(machine: Machine, way: Any, *leaves: Tensor) -> dict[str, Any]:
    """Milliseconds, peak MiB above the arguments, loss and gradients' norms."""
    hidden, weight, _ = leaves
    machine.free()
    before = torch.cuda.memory_allocated()
    times, norms = [], list[float]()
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = way(*leaves)
        gradients = torch.autograd.grad(loss / TOKENS, (hidden, weight))
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
        norms = [float(gradient.double().norm()) for gradient in gradients]
        del gradients
    return {
        "ms": round(statistics.median(times[1:]), 2),
        "peak_mib_above_arguments": (torch.cuda.max_memory_allocated() - before) >> 20,
        "loss": round(loss.item() / TOKENS, 6),
        "gradient_norms": norms,
    }
