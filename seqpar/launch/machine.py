"""What this machine has: versions, devices, engines, and the command for what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from seqpar.launch.placement import count_cuda_devices

__all__ = ["Machine", "inspect_machine"]

REQUIRED = ("torch", "numpy", "pulp", "highspy", "pydantic", "PyYAML", "rich", "typer")
EXTRAS = {"ray": "ray", "matplotlib": "plot", "transformers": "hf", "megatron-core": "megatron"}
OPTIONAL = {"triton": "pip install triton", "tensorboard": "pip install tensorboard"}


@dataclass(frozen=True)
class Machine:
    """One machine's report; `missing` maps a package to the command that installs it."""

    versions: dict[str, str]
    missing: dict[str, str]
    devices: list[dict[str, Any]]
    engines: dict[str, str]
    system: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @property
    def healthy(self) -> bool:
        """Whether everything that seqpar cannot do without is there."""
        return not any(name in self.missing for name in REQUIRED)


def inspect_machine(folder: Path | None = None) -> Machine:
    """Look at this machine; `folder` is where runs are kept (its free space is reported)."""
    versions = {"python": platform.python_version(), "seqpar": version_of("seqpar") or "source"}
    missing: dict[str, str] = {}
    for name in REQUIRED:
        _note(name, "pip install seqpar", versions, missing)
    for name, extra in EXTRAS.items():
        _note(name, f"pip install 'seqpar[{extra}]'", versions, missing)
    for name, command in OPTIONAL.items():
        _note(name, command, versions, missing)
    engines = {"local": "ready"}
    engines["ray"] = "ready" if "ray" in versions else f"needs ray: {missing['ray']}"
    return Machine(versions, missing, devices(), engines, system(folder or Path.cwd()))


def version_of(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _note(name: str, command: str, versions: dict[str, str], missing: dict[str, str]) -> None:
    version = version_of(name)
    if version is None:
        missing[name] = command
    else:
        versions[name] = version


def devices() -> list[dict[str, Any]]:
    """The processor, then every CUDA device with its memory."""
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "cores": cores()}
    ]
    for index in range(count_cuda_devices()):
        import torch

        properties = torch.cuda.get_device_properties(index)
        memory = {"memory_bytes": properties.total_memory}
        found.append({"device": f"cuda:{index}", "name": properties.name, **memory})
    return found


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system(folder: Path) -> dict[str, Any]:
    """Memory, shared memory and disk, in bytes, and the kernel."""
    shared = Path("/dev/shm")
    return {
        "platform": platform.platform(),
        "memory_bytes": psutil.virtual_memory().total,
        "shared_memory_free_bytes": shutil.disk_usage(shared).free if shared.is_dir() else None,
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }
