"""A model of the user's own, on seqpar's operators: what a wrapped nn.Module looks like."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from seqpar.layout import SequenceLayout
from seqpar.ops.softmax import softmax_attention
from seqpar.ops.state import state_attention

VOCABULARY, HIDDEN, HEADS = 61, 16, 2


class Mixer(nn.Module):
    """Softmax or lightning attention, behind one projection."""

    def __init__(self, *, state: bool) -> None:
        super().__init__()
        self.state = state
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.mixed_norm = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, *, layout: SequenceLayout, group: ProcessGroup | None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3 * HEADS, -1)).chunk(3, dim=2)
        if self.state:
            decay = torch.tensor([-0.05, -0.3])
            q = q * q.shape[-1] ** -0.5
            mixed, _ = state_attention(q, k, v, log_decay=decay, layout=layout, group=group)
        else:
            mixed = softmax_attention(q, k, v, layout=layout, group=group)
        return x + self.out(self.mixed_norm(mixed.flatten(2)))


class SmallHybrid(nn.Module):
    """Embeddings, a lightning layer, a softmax layer, a head; optionally checkpointed."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(512, HIDDEN)
        self.layers = nn.ModuleList([Mixer(state=True), Mixer(state=False)])
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        layout: SequenceLayout,
        group: ProcessGroup | None,
    ) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, use_reentrant=False, layout=layout, group=group)
            else:
                x = layer(x, layout=layout, group=group)
        return self.head(x)


def small_hybrid(*, checkpointed: bool = False) -> SmallHybrid:
    """The same weights on every rank, projections large enough that attention is not uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallHybrid(checkpointed=checkpointed)
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv.weight.mul_(2.0)
    return model


def forgets_the_other_ranks() -> SmallHybrid:
    """The same with a planted error: its softmax layer sees this rank's tokens only."""
    model = small_hybrid()

    class LocalMixer(Mixer):
        def forward(
            self, x: Tensor, *, layout: SequenceLayout, group: ProcessGroup | None
        ) -> Tensor:
            alone = SequenceLayout.contiguous((0, x.shape[1]), 1) if group else layout
            return super().forward(x, layout=alone, group=None)

    model.layers[1].__class__ = LocalMixer
    return model
