# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel of `PeerMemory.all_gather`; imported only where it is launched.

Legend: i_ index, o_ offset, p_ pointer, m_ mask, b_ block value.

Every rank's memory holds, in words of 4 bytes: flags `full` [SLOTS, BLOCKS, W], flags `read`
[SLOTS, BLOCKS, W], and SLOTS buffers. A flag is 0 or 1, and whoever waits for a 1 takes it away: so
nothing counts calls, and a captured graph can be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["peer_gather_kernel"]


@triton.jit
def _wait(p_flag):
    """Until the flag is 1; then it is 0, and what was written before it was set can be read."""
    while tl.atomic_cas(p_flag, 1, 0, sem="acquire", scope="sys") != 1:
        pass


@triton.jit
def _set(p_flag):
    """The flag is 1 for all devices, after everything that this program wrote or read before."""
    tl.atomic_xchg(p_flag, 1, sem="release", scope="sys")


@triton.jit
def _memory_of(p_peers, i_peer):
    """A rank's memory, in words."""
    return tl.load(p_peers + i_peer).to(tl.pointer_type(tl.int32))


@triton.jit
def peer_gather_kernel(
    p_message,
    p_gathered,
    p_peers,
    words,
    capacity,
    RANK: tl.constexpr,
    W: tl.constexpr,
    SLOT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """gathered[r] = rank r's message, words of 4 bytes. Grid: the same number of programs on all.

    Program i carries tiles i, i + programs, ... and waits for program i of its peers alone.
    `peers` [W] int64 holds the addresses of the ranks' memories as this device sees them. Buffers
    begin at multiples of 16 bytes, which the compiler must be told to move 16 bytes at once.
    """
    i_b, num_b = tl.program_id(0), tl.num_programs(0)
    p_from = p_message.to(tl.pointer_type(tl.int32))
    p_to = p_gathered.to(tl.pointer_type(tl.int32))
    p_own = _memory_of(p_peers, RANK)
    o_full = (SLOT * BLOCKS + i_b) * W
    o_read = SLOTS * BLOCKS * W + o_full
    o_slot = 2 * SLOTS * BLOCKS * W + SLOT * capacity
    num_tiles = tl.cdiv(words, TILE)
    for i_step in tl.static_range(1, W):
        _wait(p_own + o_read + (RANK + i_step) % W)
    tl.debug_barrier()
    for i in range(i_b, num_tiles, num_b):
        o_word = i * TILE + tl.arange(0, TILE)
        m_word = o_word < words
        b_word = tl.load(p_from + o_word, mask=m_word)
        tl.store(tl.multiple_of(p_own + o_slot + o_word, 16), b_word, mask=m_word)
        tl.store(p_to + RANK * words + o_word, b_word, mask=m_word)
    tl.debug_barrier()
    for i_step in tl.static_range(1, W):
        p_peer = _memory_of(p_peers, (RANK + i_step) % W)
        _set(p_peer + o_full + RANK)
    for i_step in tl.static_range(1, W):
        i_peer = (RANK + i_step) % W
        p_peer = _memory_of(p_peers, i_peer)
        _wait(p_own + o_full + i_peer)
        tl.debug_barrier()
        for i in range(i_b, num_tiles, num_b):
            o_word = i * TILE + tl.arange(0, TILE)
            m_word = o_word < words
            p_word = tl.multiple_of(p_peer + o_slot + o_word, 16)
            b_word = tl.load(p_word, mask=m_word, cache_modifier=".cv")
            tl.store(p_to + i_peer * words + o_word, b_word, mask=m_word)
        tl.debug_barrier()
        _set(p_peer + o_read + RANK)
