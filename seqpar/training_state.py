"""Everything a run needs to go on after a fault: weights, optimizer, schedule, data position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqpar.launch.checkpoint import CheckpointStore

__all__ = ["TrainingState"]


def warm_up_and_cosine(step: int, total_steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up over a fifth, then a cosine to 0.1."""
    warm_up = max(1, total_steps // 5)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    progress = (step - warm_up) / max(1, total_steps - warm_up)
    return 0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0))


class TrainingState:
    """A model with its AdamW optimizer and learning-rate schedule, saved and restored as one.

    Attributes:
        step: optimizer steps taken.
        position: documents drawn by then.
        notes: whatever else the run wants back, as JSON: cost model, measured steps.

    Args:
        model: the same on every rank (it is saved once).
        learning_rate: the schedule's peak.
        total_steps: length of the schedule.
        folder: where checkpoints go.
        run_id: whose checkpoints to restore from; a fresh run in an old folder starts afresh.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, total_steps: int, folder: Path, run_id: str
    ) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm_up_and_cosine(step, total_steps)
        )
        self.step = 0
        self.position = 0
        self.notes: dict[str, Any] = {}
        self._store = CheckpointStore(folder, run_id=run_id)
        self._saved_step = -1

    def take_step(self, *, position: int) -> None:
        """Apply the gradients, advance the schedule, and remember the data position."""
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position = position

    def save(self) -> None:
        """Write a checkpoint in the background; collective. Nothing to do if this step has one."""
        if self.step != self._saved_step:
            self._store.save_async(self.step, self._tensors(), self._values())
            self._saved_step = self.step

    def restore(self) -> bool:
        """Load the run's latest complete checkpoint, if there is one; collective."""
        checkpoint = self._store.latest_complete()
        if checkpoint is None:
            return False
        self._make_optimizer_state()
        tensors = self._tensors()
        values = self._store.load(checkpoint, tensors)
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.schedule.load_state_dict(values["schedule"])
        torch.set_rng_state(values["random_state"])
        self.position, self.notes = values["position"], values["notes"]
        self.step = self._saved_step = checkpoint.step
        return True

    def close(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self._store.close()

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _values(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "schedule": self.schedule.state_dict(),
            "random_state": torch.get_rng_state(),
            "notes": self.notes,
        }

    def _make_optimizer_state(self) -> None:
        """One step on zero gradients at rate 0: a checkpoint is loaded in place, and Adam makes
        its moments only when it first steps."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
