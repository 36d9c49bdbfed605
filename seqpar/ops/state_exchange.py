"""How states travel along the chain: interchangeable exchanges, each a generator of requests.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.

Each takes the links' own summaries (S_l, G_l) and gives, for every link of this rank that takes,
what enters it: E_l = Σ_(p<l) exp(Σ_(p<i<l) G_i) S_p, over the links that hold its document.

| exchange        | hops one after another | bytes received by a rank, contiguous layout  |
| all_gather      | 1                      | (W - 1) states, and transitions if not known |
| chain           | W - 1                  | 1 state                                      |
| pipelined_chain | W - 1, of a slice each | 1 state                                      |
| log_step        | log2 W                 | up to log2 W states, and transitions         |

Where the decays are known to all (fixed decay) and `Scan.host_log_decay` is set, heads whose decay
over a whole link falls under the floor stop there: `all_gather` sends them to the next link only,
`log_step` leaves them out of a round, and the chains send them on without waiting.
"""

from __future__ import annotations

from collections.abc import Callable

from seqpar.ops.state_double import log_step_states
from seqpar.ops.state_gather import all_gather_states
from seqpar.ops.state_pass import chain_states, pipelined_chain_states
from seqpar.ops.state_scan import Entries, Scan
from seqpar.ops.steps import Steps

__all__ = ["EXCHANGES"]

EXCHANGES: dict[str, Callable[[Scan], Steps[Entries]]] = {
    "all_gather": all_gather_states,
    "chain": chain_states,
    "pipelined_chain": pipelined_chain_states,
    "log_step": log_step_states,
}
"""By name: every exchange that moves states. `all_to_all` moves tokens: see state_heads."""
