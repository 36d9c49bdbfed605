"""What wrapped models are measured against, each called as its own documentation calls it.

- torch's `context_parallel`, which is what accelerate's `ParallelismConfig(cp_size=...)` turns on,
  with whole logits, as its user gets them.
- DeepSpeed's Ulysses for Hugging Face models (`UlyssesSPAttentionHF`) with the tiled logits loss
  and, if asked for, the tiled MLP of its Arctic Long Sequence Training (arXiv 2506.13996), over
  torch's own attention. DeepSpeed is installed without compiled operators; its engine, ZeRO and
  the offloading of checkpoints to the CPU are not used, for no other row has their like.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.wrapped import Machine
from seqpar.loss import token_loss_sum

LOGITS_SLICE_BYTES = 1 << 28
"""What one slice of ALST's tiled loss holds of fp32 logits: as much as a block of seqpar's head.

With slices of 1 GiB, as in ALST's examples, the loss is the peak of streams up to 100,000 tokens.
"""


def torch_context_parallel(machine: Machine, model: nn.Module, count: int) -> Tensor:
    """Forward and backward under torch's context parallelism; this rank's share of the mean."""
    from torch.distributed.tensor.experimental import context_parallel

    batch = machine.batch(count, None, "contiguous")
    positions = torch.arange(count, device=machine.device)[None]
    buffers: list[Tensor] = [batch.ids, batch.labels, positions]
    hooks = [
        module.register_forward_pre_hook(_causal_without_mask, with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    with context_parallel(
        machine.mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
    ):
        logits = model(**_inputs(batch.ids, positions)).logits
        loss = token_loss_sum(logits, batch.labels)[0] / (count - 1)
        loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach()


@contextmanager
def deepspeed_ulysses(
    machine: Machine, model: nn.Module, *, tiled_mlp: bool
) -> Iterator[Callable[[int], Tensor]]:
    """Forward and backward under DeepSpeed's Ulysses, contiguous shards."""
    import deepspeed.comm
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.comm.init_distributed(dist_backend="nccl" if machine.cuda else "gloo")
    for name in vars(parallel_state_sp):  # it makes its groups for one model a process
        if name.endswith("_PARALLEL_GROUP"):
            setattr(parallel_state_sp, name, None)
    core = ALL_ATTENTION_FUNCTIONS["sdpa"]
    UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", sequence_parallel_size=machine.ranks, micro_batch_size=1
    )
    ulysses = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = core  # between steps other ways use torch's own
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]

    def step(count: int) -> Tensor:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ulysses
        for mlp in mlps if tiled_mlp else ():
            mlp.forward = functools.partial(_tiled_mlp, mlp)
        try:
            return _deepspeed_step(machine, model, count)
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = core
            for mlp in mlps if tiled_mlp else ():
                del mlp.forward

    yield step


def _deepspeed_step(machine: Machine, model: Any, count: int) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    batch = machine.batch(count, machine.mesh, "contiguous")
    hidden = model.model(**_inputs(batch.ids, batch.position_ids)).last_hidden_state
    head = model.lm_head
    slices = math.ceil(batch.ids.numel() * head.weight.shape[0] * 4 / LOGITS_SLICE_BYTES)
    nll_sum: Tensor = TiledFusedLogitsLoss.apply(
        _nll_sum, head, hidden, batch.labels, None, slices, [head.weight], "sum"
    )
    # Its backward has run for the head's weight, with a factor of one: the sum is what is learnt.
    nll_sum.backward()
    return nll_sum.detach() / (count - 1)


def _nll_sum(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden).float()
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def _tiled_mlp(mlp: Any, hidden: Tensor) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    tiles = math.ceil(hidden.shape[1] / hidden.shape[2])
    output: Tensor = TiledMLP.apply(_mlp, mlp, hidden, tiles, list(mlp.parameters()))
    return output


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    output: Tensor = type(mlp).forward(mlp, hidden)
    return output


def _inputs(ids: Tensor, positions: Tensor) -> dict[str, Any]:
    # A mask of four dims is passed on as it is, so that none is built for nothing.
    mask = torch.zeros(1, 1, 1, 1, device=ids.device)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
    }


def _causal_without_mask(module: nn.Module, arguments: Any, inputs: dict[str, Any]) -> Any:
    """What accelerate's context parallelism hooks into every attention layer."""
    return arguments, {**inputs, "attention_mask": None, "is_causal": True}
