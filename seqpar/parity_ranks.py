"""Run a parity check on ranks of this machine: what `seqpar check` does.

Every rank is a process of its own, on gloo and CPU or on NCCL and one CUDA device each. A model is
named, not handed over: a family of Hugging Face models gives a tiny random one, and
`package.module:function` calls that function, which must build the same weights on every rank.
"""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seqpar.adapters.families import family_of
from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.errors import LaunchError, MeshError, SeqparError, UnsupportedModelError
from seqpar.ops.softmax_choice import Strategy
from seqpar.parity import ParityReport, check_parity
from seqpar.wrap import parallelize

__all__ = ["DEFAULT_LENGTHS", "ParityJob", "check_on_ranks"]

DEFAULT_LENGTHS = (13, 1, 29, 2, 7)
"""Documents of awkward lengths: of one token, within one rank, over three ranks of four."""


@dataclass(frozen=True)
class ParityJob:
    """What to check, and how.

    Attributes:
        model: a family ("llama", "LlamaConfig"), or "package.module:function" that builds a model.
        ranks: sequence-parallel ranks.
        lengths: tokens of each document of the batch.
        strategy, exchange: as `parallelize` takes them.
        layout: "contiguous" or "zigzag".
        device: "cpu" or "cuda".
        seed: of the token ids.
    """

    model: str
    ranks: int = 4
    lengths: Sequence[int] = DEFAULT_LENGTHS
    strategy: Strategy = "auto"
    exchange: str = "auto"
    layout: str = "contiguous"
    device: str = "cpu"
    seed: int = 0


def check_on_ranks(job: ParityJob, *, timeout_s: float = 300.0) -> ParityReport:
    """Start the ranks, wrap the model, compare it in float32 with one device, end the ranks.

    Raises:
        ParityError: they differ; the message names the first module that diverges.
        UnsupportedModelError: the model is unknown or cannot be wrapped.
        MeshError: more ranks than CUDA devices.
        LaunchError: a rank died or did not end in time.
    """
    if job.device == "cuda" and job.ranks > torch.cuda.device_count():
        raise MeshError(
            f"{job.ranks} ranks need as many CUDA devices, found {torch.cuda.device_count()}: "
            "ask for fewer ranks, or for the CPU"
        )
    _check_name(job.model)
    # Ranks fork from a server that has imported what all of them need, and no CUDA yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.modeling_utils"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(rank, job, folder, timeout_s), daemon=True)
            for rank in range(job.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        for process in processes:
            process.kill()
            process.join()
        results = [_result(Path(folder), rank) for rank in range(job.ranks)]
    failures = [result for result in results if isinstance(result, BaseException)]
    own = [failure for failure in failures if isinstance(failure, SeqparError)]
    if failures:
        raise (own or failures)[0]
    report: ParityReport = results[0]
    return report


def build_model(name: str) -> nn.Module:
    """A model by its name; see `ParityJob.model`."""
    if ":" not in name:
        return tiny_model(family_of(name))
    module_name, _, function_name = name.partition(":")
    model: nn.Module = getattr(importlib.import_module(module_name), function_name)()
    return model


def _check_name(name: str) -> None:
    """Refuse an unknown model before any process is started."""
    module_name, colon, function_name = name.partition(":")
    if not colon:
        family_of(name)
        return
    try:
        getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            name, f"there is no such function ({error})", "name it as package.module:function"
        ) from error


def _rank_main(rank: int, job: ParityJob, folder: str, timeout_s: float) -> None:
    result: Any
    try:
        result = _check(rank, job, folder, timeout_s)
    except SeqparError as error:
        result = error
    except BaseException as error:
        result = LaunchError(f"rank {rank} failed: {type(error).__name__}: {error}")
    try:
        payload = pickle.dumps(result)
    except Exception:
        payload = pickle.dumps(LaunchError(str(result)))
    (Path(folder) / f"result-{rank}").write_bytes(payload)


def _check(rank: int, job: ParityJob, folder: str, timeout_s: float) -> ParityReport:
    cuda = job.device == "cuda"
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=job.ranks,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", rank) if cuda else None,
    )
    try:
        model = build_model(job.model).to(job.device, torch.float32)
        group = dist.group.WORLD
        parallelize(model, group, strategy=job.strategy, exchange=job.exchange)
        stream = tiny_stream(model, job.lengths, seed=job.seed)
        batch = shard(stream, group, layout=job.layout, device=job.device)  # type: ignore[arg-type]
        return check_parity(model, batch)
    finally:
        dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result-{rank}"
    if not path.exists():
        return LaunchError(f"rank {rank} died or did not end in time")
    return pickle.loads(path.read_bytes())
