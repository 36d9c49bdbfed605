"""When the last message of a backward is posted: before the own block, or under its last heads.

Links between GPUs sleep when nothing has crossed them for a while, and awake ones cost attention
at a device's power limit about 2% of its clock. Forward's first message goes when forward begins.
If backward's last one goes just before backward ends, the two meet wherever a backward is followed
by a forward, and between two ranks the links sleep from one such pair to the next:

    forward  |k v . . . . . . . . .|                    k v    a block's keys and values travel
    backward |. . . . . . . . . . . . . . . . dk dv|    dk dv  the last gradients travel

So a long own block is worked on in two parts, most heads first, and the gradients travel under the
last few. Both parts together take as long as the whole: heads are independent. Each rank decides
for itself: a message posted later is posted in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

from seqpar.ops.softmax_choice import BYTES_PER_S, FLOPS_PER_S
from seqpar.ops.softmax_operands import Operands
from seqpar.ops.softmax_tiles import Tile, num_pairs

__all__ = ["heads_before_last_message"]

SLEEP_S = 0.05
"""Links between H200s sleep after this (`nvidia-smi nvlink -gLowPwrInfo`); the owner's setting."""

LEAST_S = SLEEP_S / 2.8
"""An own block, or a document of it, that takes less is worked on at once.

Two ranks' forward and backward take 2.8 times their own block's backward: two blocks, forward 0.4
of a backward. If that is less than SLEEP_S the links never sleep. And a short document's last heads
would be few for cuDNN, its heads in two parts two more shapes to plan.
"""

MARGIN = 3.0
"""The last heads take so many times as long as the message: ranks do not end together.

On two H200s 3 and 6 measured alike.
"""


def heads_before_last_message(x: Operands, tiles: Sequence[Tile], num_elements: int) -> int:
    """How many key/value heads of the own block to work on first; 0: the message goes first.

    Args:
        x: operands of the own block. tiles: of it.
        num_elements: of the message.
    """
    pairs = [num_pairs(tile) for tile in tiles]
    heads_and_dims = x.q.shape[2] * (3 * x.q.shape[3] + 2 * x.v.shape[3])  # five products
    pair_s = 2 * x.q.shape[0] * heads_and_dims / FLOPS_PER_S
    if not num_elements or pair_s * min(pairs, default=0) < LEAST_S:
        return 0
    message_s = num_elements * x.k.element_size() / BYTES_PER_S
    heads = x.k.shape[2]
    late = -(-heads * MARGIN * message_s // (pair_s * sum(pairs)))
    return max(0, heads - int(late))
