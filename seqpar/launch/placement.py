"""What a job file comes to on this machine: ranks, devices, environment, commands.

`place` decides before anything is started, and `Placement.describe` is what `--dry-run` prints.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqpar.errors import JobSpecError
from seqpar.launch.spec import JobSpec

__all__ = ["Placement", "count_cuda_devices", "place", "rank_command"]

WORKER = Path(__file__).with_name("worker.py")
LOOPBACK = "127.0.0.1"
DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA's driver (cards, and boards of the Jetson kind), AMD's, and Windows' for Linux."""


@dataclass(frozen=True)
class Placement:
    """A job made definite: `num_ranks` ranks on `device` ("cpu" or "cuda")."""

    spec: JobSpec
    num_ranks: int
    device: str
    num_devices: int
    run_dir: Path
    run_id: str
    resume: bool = False

    def worker_command(self) -> list[str]:
        """The command of every rank."""
        return rank_command(self.spec.command())

    def environment(self) -> dict[str, str]:
        """What every rank finds set besides torchrun's own variables; the job's `env` wins."""
        given = {
            "SEQPAR_RUN_DIR": str(self.run_dir),
            "SEQPAR_RUN_ID": self.run_id,
            "SEQPAR_CHECKPOINT_DIR": str(self.spec.checkpoint_folder()),
            "SEQPAR_HANG_TIMEOUT_S": f"{self.spec.hang_timeout_s:g}",
        }
        if self.resume:
            given["SEQPAR_RESUME"] = "1"
        threads = max(1, (os.cpu_count() or 1) // self.num_ranks)
        if "OMP_NUM_THREADS" not in os.environ:
            given["OMP_NUM_THREADS"] = str(threads)
        if self.device == "cpu":
            given["CUDA_VISIBLE_DEVICES"] = ""
        return given | self.spec.env

    def describe(self) -> dict[str, Any]:
        """The placement as plain values, for `--dry-run` and `--json`."""
        return {
            "name": self.spec.name,
            "engine": self.spec.engine,
            "address": self.spec.address,
            "host": socket.gethostname(),
            "device": self.device,
            "devices_found": self.num_devices,
            "ranks": [
                {"rank": rank, "device": f"cuda:{rank}" if self.device == "cuda" else "cpu"}
                for rank in range(self.num_ranks)
            ],
            "placement": self._placement_words(),
            "degrees": list(self.spec.degrees),
            "command": self.worker_command(),
            "environment": self.environment(),
            "port": self.spec.port or "a free one, held from the moment it is chosen",
            "run_dir": str(self.run_dir),
            "checkpoint_dir": str(self.spec.checkpoint_folder()),
            "restarts": self.spec.restarts,
            "hang_timeout_s": self.spec.hang_timeout_s,
            "timeout_s": self.spec.timeout_s,
        }

    def _placement_words(self) -> str:
        if self.spec.engine == "local":
            return "all ranks on this host"
        where = f"the nodes of {self.spec.address}" if self.spec.address else "an embedded Ray here"
        resources = self.spec.resources
        return f"{resources.placement} over {where}, {resources.cpus_per_rank:g} CPUs a rank"


def rank_command(script: list[str]) -> list[str]:
    """How this machine runs a rank; `-P` keeps the worker's own folder off the path."""
    return [sys.executable, "-u", "-P", str(WORKER), *script]


def count_cuda_devices() -> int:
    """CUDA devices that torch sees here; 0 without a CUDA build.

    On Linux without any driver's device file the answer is known without torch's import.
    """
    if sys.platform == "linux" and not any(Path(path).exists() for path in DRIVER_FILES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def place(spec: JobSpec, *, num_cuda: int | None = None, run_id: str | None = None) -> Placement:
    """Decide the ranks and devices of a job; `num_cuda` overrides what the machine has.

    Raises:
        JobSpecError: CUDA is asked for and absent, or there are more ranks than devices and the
            file neither allows that nor lets the number of ranks follow the devices.
    """
    if spec.devices == "cpu":
        num_cuda = 0
    elif num_cuda is None:
        num_cuda = count_cuda_devices()
    if spec.port is not None:
        _check_port(spec)
    if num_cuda == 0:
        if spec.devices == "cuda":
            raise JobSpecError(
                f"job {spec.name}: devices is cuda and this machine has no CUDA device: "
                "set devices to auto or cpu"
            )
        return _placed(spec, spec.nproc, "cpu", os.cpu_count() or 1, run_id)
    return _placed(spec, _ranks_on_cuda(spec, num_cuda), "cuda", num_cuda, run_id)


def _check_port(spec: JobSpec) -> None:
    try:
        socket.create_server((LOOPBACK, spec.port or 0)).close()
    except OSError as error:
        raise JobSpecError(
            f"job {spec.name}: port {spec.port} cannot be had ({error.strerror}): "
            "set port to another, or leave it out for a free one"
        ) from None


def _ranks_on_cuda(spec: JobSpec, num_cuda: int) -> int:
    if spec.nproc_on_cuda == "auto":
        ranks = spec.largest_allowed(num_cuda)
        if ranks < spec.min_nproc:
            raise JobSpecError(
                f"job {spec.name}: {num_cuda} CUDA devices allow {ranks} ranks of its geometry, "
                f"and min_nproc is {spec.min_nproc}: set devices to cpu, or lower min_nproc or sp"
            )
        return ranks
    ranks = spec.nproc_on_cuda or spec.nproc
    if ranks > num_cuda and not spec.allow_oversubscribe:
        raise JobSpecError(
            f"job {spec.name}: {ranks} ranks on {num_cuda} CUDA devices: set nproc to {num_cuda}, "
            "nproc_on_cuda to auto, or allow_oversubscribe to true"
        )
    if not spec.allows(ranks):
        raise JobSpecError(
            f"job {spec.name}: nproc_on_cuda {ranks} does not fit the degrees "
            f"{list(spec.degrees)}; {spec.largest_allowed(ranks)} would fit"
        )
    return ranks


def _placed(spec: JobSpec, ranks: int, device: str, found: int, run_id: str | None) -> Placement:
    return Placement(spec, ranks, device, found, spec.run_folder(), run_id or uuid.uuid4().hex)
