"""Which exchange a scattered mixer uses when it may choose: the same answer on every rank."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.kernels.entry_product import LOG_FLOOR
from seqpar.layout import SequenceLayout
from seqpar.ops.state_mixer import StateKind
from seqpar.ops.state_places import places_of
from seqpar.planners.exchange import (
    ETHERNET_LOOPBACK,
    INFINIBAND_NDR,
    NVLINK_H200,
    PEERS_H200,
    ExchangeChoice,
    ExchangeProblem,
    Link,
    choose_exchange,
)

__all__ = ["choose_for", "default_link"]

GPUS_PER_HOST = 8


def default_link(group: ProcessGroup | None) -> Link:
    """Figures for a group by its backend and size: loopback, NVLink in a host, else InfiniBand."""
    if comm.backend_of(group) != "nccl":
        return ETHERNET_LOOPBACK
    if comm.shares_memory(group):
        return PEERS_H200
    return NVLINK_H200 if comm.group_size(group) <= GPUS_PER_HOST else INFINIBAND_NDR


def choose_for(
    kind: StateKind,
    layout: SequenceLayout,
    inputs: tuple[tuple[torch.Size, torch.dtype], ...],
    link: Link,
) -> ExchangeChoice:
    """The choice for a mixer and layout; `print` it to see every estimate.

    Args:
        inputs: shape and dtype of this rank's tensors [B, T, ...]; T does not matter, the layout
            says all ranks'.
        link: what joins the ranks.
    """
    shape, dtype = inputs[0]
    batch, item_bytes = shape[0], 8 if dtype == torch.float64 else 4
    token_bytes = sum(shape[2:].numel() * dtype.itemsize for shape, dtype in inputs)
    token_bytes += math.prod(kind.output_shape) * dtype.itemsize
    carried = None if kind.knows_transitions else kind.transition_dims
    state_shape = kind.state_shape
    chain = places_of(layout, 0).chain
    elements = math.prod(state_shape)
    if carried is not None:
        elements += math.prod(state_shape[:carried])
    givers = Counter(link.rank for link in chain.links if link.gives)
    problem = ExchangeProblem(
        world_size=layout.world_size,
        reach=chain.longest_reach,
        state_bytes=batch * elements * item_bytes,
        tokens=batch * max(map(layout.tokens_on, range(layout.world_size))),
        token_bytes=token_bytes,
        heads=state_shape[0],
        far_share=_far_share(kind.host_log_decay, [x.num_tokens for x in chain.links if x.passes]),
        links_per_rank=max(givers.values(), default=1),
        heads_apart=kind.heads_apart,
    )
    return choose_exchange(problem, link)


def _far_share(decay: tuple[float, ...] | None, passing_tokens: list[int]) -> float:
    """The share of heads that still matter beyond the shortest link they pass."""
    if decay is None or not passing_tokens:
        return 1.0
    return sum(g * min(passing_tokens) >= LOG_FLOOR for g in decay) / len(decay)
