"""What ranks report, kept: metrics.jsonl for programs, TensorBoard events for eyes.

The launcher samples every rank's last report twice a second, so steps shorter than that are not
all there. Scalars are named `<what>/rank-<r>`, over steps.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from seqpar.errors import MissingExtraError
from seqpar.launch.rundir import RunDir

__all__ = ["MetricsLog"]

SCALARS = ("loss", "tokens_per_s", "memory_bytes")


class MetricsLog:
    """Appends each new report of a rank once; used from one thread.

    Raises:
        MissingExtraError: TensorBoard events are asked for and it is not installed.
    """

    def __init__(self, run_dir: RunDir, *, tensorboard: bool) -> None:
        self.run_dir = run_dir
        self.last: dict[int, float] = {}
        self.writer: Any = None
        if tensorboard:
            if importlib.util.find_spec("tensorboard") is None:
                raise MissingExtraError("tensorboard", "dev", "the job's tensorboard: true")
            from torch.utils.tensorboard import SummaryWriter

            folder = str(run_dir.path / "tensorboard")
            self.writer = SummaryWriter(folder)

    def note(self, progress: dict[int, dict[str, Any]]) -> None:
        """Keep the reports that are new since the last call."""
        new = {rank: report for rank, report in progress.items() if self._is_new(rank, report)}
        if not new:
            return
        with (self.run_dir.path / "metrics.jsonl").open("a") as file:
            for rank, report in new.items():
                file.write(json.dumps({"rank": rank, **report}) + "\n")
        for rank, report in new.items() if self.writer is not None else ():
            for name in SCALARS:
                if report[name] is not None:
                    tag = f"{name}/rank-{rank}"
                    self.writer.add_scalar(tag, report[name], report["step"], report["time"])

    def _is_new(self, rank: int, report: dict[str, Any]) -> bool:
        if self.last.get(rank) == report["time"]:
            return False
        self.last[rank] = report["time"]
        return True

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self.writer is not None:
            self.writer.close()
