"""Which exchange a scattered mixer uses when it may choose: the same answer on every rank."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

import torch
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.kernels.entry_product import LOG_FLOOR
from seqpar.layout import SequenceLayout
from seqpar.ops.state_mixer import Inputs, Mixer
from seqpar.ops.state_places import places_of
from seqpar.planners.exchange import (
    ETHERNET_LOOPBACK,
    INFINIBAND_NDR,
    NVLINK_H200,
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
    return NVLINK_H200 if comm.group_size(group) <= GPUS_PER_HOST else INFINIBAND_NDR


def choose_for(
    mixer: Mixer, inputs: Inputs, layout: SequenceLayout, *, link: Link
) -> ExchangeChoice:
    """The choice for a mixer and layout; `print` it to see every estimate.

    Args:
        inputs: this rank's tensors [B, T, ...]; T does not matter, the layout says all ranks'.
        link: what joins the ranks.
    """
    output = mixer.empty_output(tuple(x[:1, :0] for x in inputs))
    rows = tuple((x.shape[2:].numel(), x.element_size()) for x in (*inputs, output))
    return _chosen(
        layout,
        link,
        batch=inputs[0].shape[0],
        state_shape=mixer.state_shape(inputs),
        item_bytes=8 if inputs[0].dtype == torch.float64 else 4,
        carried_dims=None if mixer.knows_transitions else mixer.transition_dims(),
        token_bytes=sum(numel * size for numel, size in rows),
        host_log_decay=mixer.host_log_decay(),
        heads_apart=mixer.of_heads(slice(0, 1)) is not None,
    )


@lru_cache(maxsize=256)
def _chosen(
    layout: SequenceLayout,
    link: Link,
    *,
    batch: int,
    state_shape: tuple[int, ...],
    item_bytes: int,
    carried_dims: int | None,
    token_bytes: int,
    host_log_decay: tuple[float, ...] | None,
    heads_apart: bool,
) -> ExchangeChoice:
    chain = places_of(layout, 0).chain
    elements = math.prod(state_shape)
    if carried_dims is not None:
        elements += math.prod(state_shape[:carried_dims])
    givers = Counter(link.rank for link in chain.links if link.gives)
    problem = ExchangeProblem(
        world_size=layout.world_size,
        reach=chain.longest_reach,
        state_bytes=batch * elements * item_bytes,
        tokens=batch * max(map(layout.tokens_on, range(layout.world_size))),
        token_bytes=token_bytes,
        heads=state_shape[0],
        far_share=_far_share(host_log_decay, [x.num_tokens for x in chain.links if x.passes]),
        links_per_rank=max(givers.values(), default=1),
        heads_apart=heads_apart,
    )
    return choose_exchange(problem, link)


def _far_share(decay: tuple[float, ...] | None, passing_tokens: list[int]) -> float:
    """The share of heads that still matter beyond the shortest link they pass."""
    if decay is None or not passing_tokens:
        return 1.0
    return sum(g * min(passing_tokens) >= LOG_FLOOR for g in decay) / len(decay)
