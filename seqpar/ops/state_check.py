"""Whether a scattered mixer can be called so: refused on all ranks alike, before any exchange.

Legend: B batch, T tokens on this rank.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.errors import KernelInputError, LayoutError, SeqparError
from seqpar.layout import SequenceLayout
from seqpar.ops.state_call import CallPlan
from seqpar.ops.state_mixer import Inputs, Mixer, StateKind

__all__ = ["agree_on_call"]


def agree_on_call(
    plan: CallPlan,
    mixer: Mixer,
    inputs: Inputs,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    initial_state: Tensor | None,
    *,
    exchange: str,
    return_final_state: bool,
) -> None:
    """Raise on every rank if any cannot be called so, or if ranks differ in what decides messages.

    A rank without tokens launches nothing, and one whose neighbour fails in a launch waits for it
    in the exchange: so what a launch would refuse is asked here, on all of them.

    Raises:
        LayoutError: what does not fit the layout or the other ranks.
        KernelInputError: what this rank's kernels cannot take.
    """
    error: type[SeqparError] = LayoutError
    problem = plan.problem
    if problem is None and (problem := _refusal(mixer, inputs, initial_state)) is not None:
        error = KernelInputError
    same = (
        _words_of_layout(layout),
        plan.exchange or exchange,
        f"{'no' if initial_state is None else 'an'} initial state",
        f"{'with' if return_final_state else 'no'} final states",
        _words_of_kind(mixer.kind(inputs)),
        tuple((x.shape[0], *x.shape[2:], x.dtype) for x in inputs),
    )
    comm.agree(problem, group, same=same, error=error)


def _refusal(mixer: Mixer, inputs: Inputs, initial_state: Tensor | None) -> str | None:
    if initial_state is not None and initial_state.device != inputs[0].device:
        return (
            f"initial_state is on {initial_state.device}, the inputs are on {inputs[0].device}: "
            "move it there"
        )
    return mixer.refusal(inputs)


@lru_cache(maxsize=64)
def _words_of_layout(layout: SequenceLayout) -> str:
    """A few words that differ between layouts that differ."""
    digest = zlib.crc32(repr((layout.cu_seqlens, layout.spans)).encode())
    return (
        f"{layout.num_documents} documents of {layout.num_tokens} tokens over "
        f"{layout.world_size} ranks, checksum {digest:08x}"
    )


@lru_cache(maxsize=64)
def _words_of_kind(kind: StateKind) -> str:
    """The same for what decides which messages travel, and what ranks assume of each other."""
    if kind.transition_dims is None:
        return "no decay"
    if not kind.knows_transitions:
        return "decays by token"
    if kind.host_log_decay is None:
        return "a fixed decay, nothing left out"
    digest = zlib.crc32(repr(kind.host_log_decay).encode())
    return f"a fixed decay, checksum {digest:08x}, what has decayed left out"
