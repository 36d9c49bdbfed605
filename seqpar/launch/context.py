"""What a script may ask of the launcher: where its run is kept, and to tell how far it is.

    run = current_run()
    store = CheckpointStore(run.checkpoint_dir, run_id=run.run_id)
    found = store.latest_complete() if run.resume else None
    dist.init_process_group("gloo", timeout=run.collective_timeout)
    ...
    run.report(step=step, loss=loss, tokens_per_s=rate)

Under plain torchrun, or with no launcher, the same calls work: the run is `runs/<script>` and
nothing is resumed unless torchrun restarts the script.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from seqpar.launch.worker import write_atomically

__all__ = ["RunContext", "current_run"]


@dataclass(frozen=True)
class RunContext:
    """This rank's place in its run; `attempt` counts restarts from 0."""

    run_dir: Path
    checkpoint_dir: Path
    run_id: str
    rank: int
    attempt: int
    resume: bool
    hang_timeout_s: float

    @property
    def collective_timeout(self) -> timedelta:
        """For `init_process_group`: a little over the launcher's bound for a hang.

        The launcher then finds the rank that the others wait for before they give up waiting.
        """
        return timedelta(seconds=self.hang_timeout_s + 10)

    def report(
        self,
        *,
        step: int,
        loss: float | None = None,
        tokens_per_s: float | None = None,
        micro_batch: int | None = None,
        group: Sequence[int] = (),
        documents: Sequence[int] = (),
    ) -> None:
        """Tell the launcher where this rank is; cheap enough for every micro-batch (one rename).

        `group` holds global ranks, `documents` their numbers in the data; both are quoted if the
        rank fails. Written to ranks/rank-<r>.progress in the run's folder; a full disk loses the
        report and does not end the training.
        """
        folder = self.run_dir / "ranks"
        report: dict[str, object] = {
            "time": time.time(),
            "attempt": self.attempt,
            "step": step,
            "loss": loss,
            "tokens_per_s": tokens_per_s,
            "micro_batch": micro_batch,
            "group": list(group),
            "documents": list(documents),
            "memory_bytes": peak_memory_bytes(),
        }
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"rank-{self.rank}.progress", report)


def current_run() -> RunContext:
    """The run that this process belongs to, from the environment that the engines set."""
    environment = os.environ
    script = Path(sys.argv[0] if sys.argv else "run").stem or "run"
    run_dir = Path(environment.get("SEQPAR_RUN_DIR", Path("runs") / script)).absolute()
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return RunContext(
        run_dir=run_dir,
        checkpoint_dir=Path(environment.get("SEQPAR_CHECKPOINT_DIR", run_dir / "checkpoints")),
        run_id=environment.get("SEQPAR_RUN_ID", environment.get("TORCHELASTIC_RUN_ID", "")),
        rank=int(environment.get("RANK", "0")),
        attempt=attempt,
        resume=attempt > 0 or environment.get("SEQPAR_RESUME") == "1",
        hang_timeout_s=float(environment.get("SEQPAR_HANG_TIMEOUT_S", "600")),
    )


def peak_memory_bytes() -> int:
    """The most memory this process has held: on its CUDA device if it uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
