"""Run a parity check on ranks of this machine: what `seqpar check` does.

Every rank is a process of its own, on gloo and CPU or on NCCL and one CUDA device each. A model is
named, not handed over: a family of Hugging Face models gives a tiny random one, and
`package.module:function` calls that function, which must build the same weights on every rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from seqpar.adapters.families import family_of
from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.errors import UnsupportedModelError
from seqpar.ops.softmax_choice import Strategy
from seqpar.parity import ParityReport, check_parity
from seqpar.ranks import run_on_ranks
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
        layout: "contiguous", "zigzag" or "balanced".
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
    _check_name(job.model)
    results = run_on_ranks(
        _check,
        job,
        ranks=job.ranks,
        device=job.device,
        timeout_s=timeout_s,
        preload=("torch", "transformers.modeling_utils"),
    )
    report: ParityReport = results[0]
    return report


def build_model(name: str) -> nn.Module:
    """A model by its name; see `ParityJob.model`."""
    if ":" not in name:
        return tiny_model(family_of(name))
    module_name, _, function_name = name.partition(":")
    model = getattr(importlib.import_module(module_name), function_name)()
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            name, f"it returned {type(model).__name__}, no nn.Module", "return the model from it"
        )
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


def _check(rank: int, job: ParityJob) -> ParityReport:
    model = build_model(job.model).to(job.device, torch.float32)
    group = dist.group.WORLD
    parallelize(model, group, strategy=job.strategy, exchange=job.exchange)
    stream = tiny_stream(model, job.lengths, seed=job.seed)
    batch = shard(stream, group, layout=job.layout, device=job.device)  # type: ignore[arg-type]
    return check_parity(model, batch)
