"""The demo's documents: the source files of the Python that runs it, as bytes.

Real text with a real long tail, on every machine, with nothing to download. Test suites that some
installations leave out are skipped, so that the corpus is nearly the same everywhere.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_HELDOUT_ONE_IN = 20


def standard_library_files() -> list[Path]:
    """Every Python file of the standard library, sorted by its path within it."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def load_corpus() -> tuple[list[Tensor], list[Tensor]]:
    """(training documents, held-out documents): int64 tensors of bytes, one a file.

    A file is held out by a checksum of its path, so that the split never depends on what else is
    installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    training: list[Tensor] = []
    heldout: list[Tensor] = []
    for path in standard_library_files():
        content = path.read_bytes()
        if not content:
            continue
        document = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
        name = path.relative_to(root).as_posix().encode()
        is_heldout = zlib.crc32(name) % _HELDOUT_ONE_IN == 0
        (heldout if is_heldout else training).append(document)
    return training, heldout
