"""The exchange by heads: every rank computes the whole stream for some of the heads (Ulysses).

Legend: B batch, T tokens on this rank, N tokens of the stream, H heads, D documents, W ranks.

Rank r takes heads [H r / W, H (r + 1) / W): any number of heads goes over any number of ranks.
Inputs travel to the ranks of their heads, outputs travel back, and the states stay where they are.

Source: DeepSpeed-Ulysses, arXiv 2309.14509; for state-space layers, Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.message_bytes import bytes_of
from seqpar.ops.state_job import Forward, Kept, StateJob
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import Inputs, Mixer
from seqpar.ops.state_scan import Entries
from seqpar.ops.steps import AllReduceSum, AllToAll, Steps

__all__ = ["Heads", "backward_by_heads", "forward_by_heads"]


def forward_by_heads(job: StateJob, inputs: Inputs, initial_state: Tensor | None) -> Steps[Forward]:
    """Outputs of the local tokens, by two all_to_alls.

    Bytes received by rank r: from each other rank p, B * T_p * H_r elements of every input (for
    lightning 2K + V, and a float32 if the decay is per token), and B * T_r * H_p * V of the output.
    """
    heads = Heads(job.part.plan.layout, job.part.plan.rank, inputs[0].shape[2])
    gathered = yield from heads.to_heads(inputs)
    whole = _whole_part(job.part.mixer, heads, gathered)
    entries: Entries = {}
    if initial_state is not None and job.part.plan.layout.num_tokens:
        entries = {0: initial_state[:, heads.mine]}
    summary, o = None, whole.empty_output(gathered)
    if heads.count:
        summary = whole.summarize(gathered)
        o = whole.output(gathered, summary, entries)
    (o_local,) = yield from heads.to_tokens((o,))
    finals = None
    if job.return_final_state:
        finals = job.part.no_states()
        if heads.count:
            finals[:, :, heads.mine] = whole.final_states(gathered, summary, entries)
        finals = yield AllReduceSum(finals)
    return Forward(o_local, finals, Kept(gathered, summary, entries))


def backward_by_heads(
    job: StateJob, kept: Kept, do: Tensor, dfinals: Tensor | None
) -> Steps[tuple[tuple[Tensor | None, ...], Tensor | None]]:
    """Gradients of the local inputs and, in this rank's heads, of the initial state.

    Bytes are those of forward with inputs and outputs exchanged.
    """
    heads = Heads(job.part.plan.layout, job.part.plan.rank, do.shape[2])
    whole = _whole_part(job.part.mixer, heads, kept.inputs)
    (do_whole,) = yield from heads.to_heads((do,))
    grads: tuple[Tensor | None, ...] = (None,) * len(kept.inputs)
    dinitial = None
    if heads.count:
        if dfinals is not None:
            dfinals = dfinals[:, :, heads.mine]
        local = (kept.inputs, do_whole, kept.summary)
        again = whole.summarize_grad(*local, kept.entries)
        grads = whole.backward(*local, again, kept.entries, {}, dfinals)
        dinitial = heads.in_place(whole.initial_state_grad(again, {}, dfinals))
    pairs = zip(grads, kept.inputs, strict=True)
    filled = tuple(torch.zeros_like(x) if grad is None else grad for grad, x in pairs)
    return (yield from heads.to_tokens(filled)), dinitial


def _whole_part(mixer: Mixer, heads: Heads, gathered: Inputs) -> RankPart:
    """The mixer of this rank's heads, over the whole stream on one device."""
    return RankPart.of(mixer.of_heads(heads.mine), _on_one_rank(heads.layout), 0, gathered)


@lru_cache(maxsize=64)
def _on_one_rank(layout: SequenceLayout) -> SequenceLayout:
    return SequenceLayout.contiguous(layout.cu_seqlens, 1)


@dataclass(frozen=True)
class Heads:
    """Who has which heads, and the two all_to_alls between tokens and heads."""

    layout: SequenceLayout
    rank: int
    total: int

    @property
    def _slices(self) -> list[slice]:
        size = self.layout.world_size
        return [slice(a, b) for a, b in pairwise(self.total * r // size for r in range(size + 1))]

    @property
    def mine(self) -> slice:
        return self._slices[self.rank]

    @property
    def count(self) -> int:
        return _size(self.mine)

    def in_place(self, states: Tensor | None) -> Tensor | None:
        """[B, H, ...] with this rank's heads from [B, H / W, ...], zero elsewhere."""
        if states is None:
            return None
        full = states.new_zeros(states.shape[0], self.total, *states.shape[2:])
        full[:, self.mine] = states
        return full

    def to_heads(self, tensors: Inputs) -> Steps[Inputs]:
        """[B, T, H, ...] of each rank's tokens to [B, N, H / W, ...] of each rank's heads."""
        size = self.layout.world_size
        sends = [_to_bytes([x[:, :, heads] for x in tensors]) for heads in self._slices]
        shapes = [
            [(x.shape[0], self.layout.tokens_on(peer), self.count, *x.shape[3:]) for x in tensors]
            for peer in range(size)
        ]
        received = yield AllToAll(sends, [_byte_shape(s, tensors) for s in shapes])
        parts = [_from_bytes(received[p], shapes[p], tensors) for p in range(size)]
        return tuple(self.layout.unshard(list(shards)) for shards in zip(*parts, strict=True))

    def to_tokens(self, tensors: Inputs) -> Steps[Inputs]:
        """The inverse of `to_heads`."""
        size, tokens = self.layout.world_size, self.layout.tokens_on(self.rank)
        sends = [_to_bytes([self.layout.shard(x, peer) for x in tensors]) for peer in range(size)]
        shapes = [
            [(x.shape[0], tokens, _size(heads), *x.shape[3:]) for x in tensors]
            for heads in self._slices
        ]
        received = yield AllToAll(sends, [_byte_shape(s, tensors) for s in shapes])
        parts = [_from_bytes(received[p], shapes[p], tensors) for p in range(size)]
        return tuple(torch.cat(shards, dim=2) for shards in zip(*parts, strict=True))


def _size(heads: slice) -> int:
    return int(heads.stop) - int(heads.start)


def _to_bytes(tensors: list[Tensor]) -> Tensor:
    """One flat uint8 message of several tensors, whatever their dtypes."""
    return torch.cat([bytes_of(x.contiguous()) for x in tensors])


def _byte_shape(shapes: list[tuple[int, ...]], like: Inputs) -> torch.Size:
    sizes = [torch.Size(s).numel() * x.element_size() for s, x in zip(shapes, like, strict=True)]
    return torch.Size((sum(sizes),))


def _from_bytes(message: Tensor, shapes: list[tuple[int, ...]], like: Inputs) -> list[Tensor]:
    tensors, offset = [], 0
    for shape, x in zip(shapes, like, strict=True):
        size = torch.Size(shape).numel() * x.element_size()
        part = message[offset : offset + size]
        if part.storage_offset() % x.element_size():
            part = part.clone()
        tensors.append(part.view(x.dtype).view(shape))
        offset += size
    return tensors
