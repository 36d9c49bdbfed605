"""What makes a checkpoint whole: a manifest of every file's size and digest, written last.

A checkpoint is a folder `step-<n>` that appeared in one rename, with a `manifest.json` that agrees
with its files. Anything else is torn. Reading never runs what a file says: the manifest is JSON,
torch's metadata goes through an unpickler that knows its few classes, tensors and plain values
through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from seqpar.errors import CheckpointError

__all__ = ["Manifest", "SafePlanner", "SafeReader", "digest_files", "find_fault", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's step, run, number of ranks, and files: name -> [size in bytes, digest]."""

    step: int
    run_id: str
    world_size: int
    files: dict[str, tuple[int, str]]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write and sync manifest.json, and sync the folder."""
        with (folder / MANIFEST).open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if it has none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = {
            str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()
        }
        return Manifest(
            int(content["step"]),
            str(content["run_id"]),
            int(content["world_size"]),
            files,
            int(content["format"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def digest_files(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """Size and BLAKE2b digest (16 bytes) of each file."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            found[name] = (os.fstat(file.fileno()).st_size, digest.hexdigest())
    return found


def find_fault(folder: Path, *, run_id: str | None) -> str | None:
    """Why a folder is no complete checkpoint (of the run, if one is named); None if it is one."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "no manifest that can be read"
    if manifest.format != FORMAT:
        return f"format {manifest.format}, and this is a reader of format {FORMAT}"
    if run_id is not None and manifest.run_id != run_id:
        return f"written by run {manifest.run_id}"
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not re.fullmatch(r"[\w.-]+", name) or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and should have {size}"
    found = digest_files(folder, list(manifest.files))
    changed = [name for name, entry in manifest.files.items() if found[name] != entry]
    return f"{changed[0]} is not what was written" if changed else None


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


def _enum_member(of: Any, name: str) -> Any:
    """`getattr` of enums alone: Python 3.11.0 to 3.11.3 pickle an enum's member by it."""
    if isinstance(of, type) and issubclass(of, Enum) and name in of.__members__:
        return of[name]
    raise CheckpointError(
        f"the checkpoint's metadata asks for {name!r} of {of!r}, which no checkpoint needs: "
        "it was not written by seqpar; do not load it"
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch's checkpoint metadata and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's metadata names {module}.{name}, which no checkpoint needs: "
            "it was not written by seqpar; do not load it"
        )


class SafeReader(FileSystemReader):
    """torch's file reader, with metadata read by an unpickler that runs nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        assert isinstance(metadata, Metadata)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's load planner, with values other than tensors read as plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what is not plain
        value.seek(0)
        super().load_bytes(read_item, value)
