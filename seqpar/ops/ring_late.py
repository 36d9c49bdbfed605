"""When the last message of a backward is posted: early in the own block, or late.

Links between GPUs sleep when nothing has crossed them for a while (50 ms between H200s), and wake
ones cost an attention at its power limit about 2% of its clock. Forward's message goes when forward
begins. If backward's last one goes just before backward ends, it has the next forward's for a
neighbour, wherever a backward follows its own forward, and the links sleep between the two:

    forward  |k v . . . . . . . . .|                    k v    a block's keys and values travel
    backward |. . . . . . . . . . . . . . . . dk dv|    dk dv  the last gradients travel

So where the own block is long, it is worked on in two parts, most heads first, and the gradients
travel under the last few. On the own block's own it costs next to nothing: heads are independent.
"""

from __future__ import annotations

from collections.abc import Sequence

from seqpar.ops.softmax_operands import Operands
from seqpar.ops.softmax_tiles import Tile, num_pairs

__all__ = ["heads_before_last_message"]

FLOPS_PER_S = 550e12
"""cuDNN attention in bfloat16 on one H200."""

BYTES_PER_S = 350e9
"""Copy engines between two H200s over NVLink, large messages."""

LEAST_S = 0.02
"""An own block that takes less is worked on at once: its message is late enough as it is."""

MARGIN = 3.0
"""The last heads take so many times as long as the message, as ranks do not end together."""


def heads_before_last_message(x: Operands, tiles: Sequence[Tile], num_elements: int) -> int:
    """How many key/value heads of the own block to work on first; 0: the message goes first.

    Args:
        x: operands of the own block. tiles: of it.
        num_elements: of the message.
    """
    if not num_elements or not x.k.numel():
        return 0
    per_pair = 10 * x.q.shape[0] * x.q.shape[2] * (x.q.shape[3] + x.v.shape[3]) / 2
    block_s = per_pair * sum(map(num_pairs, tiles)) / FLOPS_PER_S
    message_s = num_elements * x.k.element_size() / BYTES_PER_S
    if block_s < LEAST_S:
        return 0
    heads = x.k.shape[2]
    late = -(-heads * MARGIN * message_s // block_s)
    return max(0, heads - int(late))
