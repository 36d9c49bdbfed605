"""Power and SM clock of GPUs every 10 ms, read by NVML in a process of its own.

    python -m benchmarks.device_power LOG GPU-UUID...

A line holds the monotonic time in seconds, then for each GPU its power in W and SM clock in MHz.
An H200 takes a new reading every 100 ms: of one sample of 0.4 s there are four.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

INSTANT_POWER, SM_CLOCK = 186, 1  # NVML_FI_DEV_POWER_INSTANT, NVML_CLOCK_SM
EVERY_S, LAG_S = 0.01, 0.06


class PowerLog:
    """Readings for as long as the context lasts."""

    def __init__(self, path: Path, uuids: Sequence[str]) -> None:
        self.path, self.uuids = path, uuids

    def __enter__(self) -> PowerLog:
        command = [sys.executable, "-m", "benchmarks.device_power", str(self.path), *self.uuids]
        self._reader = subprocess.Popen(command)
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.terminate()
        self._reader.wait(5)

    def means(self, spans: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
        """By GPU, over the spans (start, stop) less the first LAG_S of each, which lag behind."""
        width = 1 + 2 * len(self.uuids)
        lines = [list(map(float, line.split())) for line in self.path.read_text().splitlines()]
        inside = [
            line
            for line in lines
            if len(line) == width and any(start + LAG_S <= line[0] <= stop for start, stop in spans)
        ]
        if not inside:
            return {}
        _, *columns = (statistics.mean(column) for column in zip(*inside, strict=True))
        return {"power_w_by_gpu": columns[::2], "clock_mhz_by_gpu": columns[1::2]}


class _Field(ctypes.Structure):
    """nvmlFieldValue_t."""

    _fields_ = [
        ("id", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("type", ctypes.c_uint),
        ("status", ctypes.c_uint),
        ("value", ctypes.c_ulonglong),
    ]


class _Device:
    def __init__(self, nvml: ctypes.CDLL, uuid: str) -> None:
        self._nvml, self._handle = nvml, ctypes.c_void_p()
        status = nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle))
        if status:
            raise SystemExit(f"NVML has no handle for {uuid}: status {status}")

    def power_w(self) -> float:
        field = _Field(id=INSTANT_POWER)
        self._nvml.nvmlDeviceGetFieldValues(self._handle, 1, ctypes.byref(field))
        return int(field.value & 0xFFFFFFFF) / 1e3

    def clock_mhz(self) -> int:
        clock = ctypes.c_uint()
        self._nvml.nvmlDeviceGetClockInfo(self._handle, SM_CLOCK, ctypes.byref(clock))
        return clock.value


def main() -> None:
    """Read until terminated."""
    path, *uuids = sys.argv[1:]
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    nvml.nvmlInit_v2()
    devices = [_Device(nvml, uuid) for uuid in uuids]
    with open(path, "w", buffering=1) as log:
        while True:
            now = time.monotonic()
            readings = (f"{device.power_w():.1f} {device.clock_mhz()}" for device in devices)
            print(f"{now:.4f}", *readings, file=log)
            time.sleep(max(0.0, now + EVERY_S - time.monotonic()))


if __name__ == "__main__":
    main()
