"""The LM head's loss, forward and backward: time and memory of each implementation.

On CUDA the peak is the allocator's; on Linux without CUDA it is the process's resident memory.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.wrapped import Machine
from seqpar.head_loss import _liger_installed, lm_head_loss_sum
from seqpar.loss import token_loss_sum

ON_CUDA = (32768, 2048, torch.bfloat16, (32768, 131072))
ON_CPU = (8192, 256, torch.float32, (32768,))


def head(machine: Machine) -> dict[str, Any]:
    """Every way to the loss, by size of the vocabulary; each in the same process."""
    tokens, width, dtype, vocabularies = ON_CUDA if machine.cuda else ON_CPU
    found: dict[str, Any] = {"tokens": tokens, "hidden": width, "dtype": str(dtype)}
    for vocabulary in vocabularies:
        generator = torch.Generator(machine.device).manual_seed(0)
        options: dict[str, Any] = {"device": machine.device, "generator": generator}
        hidden = torch.randn(tokens, width, **options).to(dtype).requires_grad_()
        weight = (0.02 * torch.randn(vocabulary, width, **options)).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,), **options)
        ways = {
            "cross_entropy": lambda h, w, x: cross_entropy((h @ w.T).float(), x, reduction="sum"),
            "token_loss": lambda h, w, x: token_loss_sum(h @ w.T, x)[0],
            "seqpar": lambda h, w, x: lm_head_loss_sum(h, w, x, implementation="seqpar")[0],
        }
        if machine.cuda and _liger_installed():
            ways["liger"] = lambda h, w, x: lm_head_loss_sum(h, w, x, implementation="liger")[0]
        found[f"vocabulary_{vocabulary}"] = {
            name: _measured(machine, way, hidden, weight, labels) for name, way in ways.items()
        }
    return found


def _measured(machine: Machine, way: Any, *leaves: Tensor) -> dict[str, Any]:
    """Milliseconds, peak MiB above the arguments, loss and gradients' norms."""
    hidden, weight, _ = leaves
    machine.free()
    before = _start_of_peak(machine)
    times, norms = [], list[float]()
    for _ in range(3 if machine.cuda else 1):
        machine.wait()
        started = time.perf_counter()
        loss = way(*leaves)
        gradients = torch.autograd.grad(loss / len(hidden), (hidden, weight))
        machine.wait()
        times.append((time.perf_counter() - started) * 1e3)
        norms = [float(gradient.double().norm()) for gradient in gradients]
        del gradients
    return {
        "ms": round(statistics.median(times[1:] or times), 2),
        "peak_mib_above_arguments": (_peak_bytes(machine) - before) >> 20,
        "loss": round(loss.item() / len(hidden), 6),
        "gradient_norms": norms,
    }


def _start_of_peak(machine: Machine) -> int:
    """Bytes held now; the peak is counted from here."""
    if machine.cuda:
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory becomes today's
    return _resident_bytes("VmRSS")


def _peak_bytes(machine: Machine) -> int:
    return torch.cuda.max_memory_allocated() if machine.cuda else _resident_bytes("VmHWM")


def _resident_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10
