# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel of `PeerMemory.all_gather`; imported only where it is launched.

Legend: i_ index, o_ offset, p_ pointer, m_ mask, b_ block value.

Every rank's memory holds, in words of 4 bytes: `calls` [BLOCKS], how many calls program i has taken
part in; `late` [BLOCKS], whether it has given up waiting; `full` [BLOCKS, W], the last call for
which a peer's buffer is filled; `read` [BLOCKS, W], the last call of which a peer needs nothing
more from here; and two buffers, of which calls use one after the other.
All numbers live on the device, so a captured graph can be replayed, and the host need not know
which call this is. They are compared by their difference, so they may overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqpar.kernels.peer_wait import set_flag, wait_for_flag

__all__ = ["peer_gather_kernel"]


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
    GIVES: tl.constexpr,
    SOURCES: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """gathered[r] = rank r's message, words of 4 bytes, for each bit r of SOURCES; only from ranks
    that give. Who reads nothing waits for nobody's message. Grid: the same number of programs on
    all.

    Program i carries tiles i, i + programs, ... and waits for program i of its peers alone.
    `peers` [W + 1] int64 holds the addresses of the ranks' memories as this device sees them, and
    that of the page of the wait's limit, if it is LIMITED. Buffers begin at multiples of 16 bytes,
    which the compiler must be told to move 16 bytes at once.
    """
    i_b, num_b = tl.program_id(0), tl.num_programs(0)
    p_from = p_message.to(tl.pointer_type(tl.int32))
    p_to = p_gathered.to(tl.pointer_type(tl.int32))
    p_own = _memory_of(p_peers, RANK)
    call = tl.load(p_own + i_b) + 1
    p_late = p_own + BLOCKS + i_b
    p_page = tl.load(p_peers + W).to(tl.pointer_type(tl.int64)) if LIMITED else p_peers
    o_full = 2 * BLOCKS + i_b * W
    o_read = BLOCKS * W + o_full
    o_slot = 2 * BLOCKS + 2 * BLOCKS * W + (call & 1) * capacity
    num_tiles = tl.cdiv(words, TILE)
    if GIVES:
        for i_step in tl.static_range(1, W):
            i_peer = (RANK + i_step) % W
            wait_for_flag(p_own + o_read + i_peer, call - 2, i_peer, p_page, p_late, LIMITED)
        tl.debug_barrier()
    if GIVES or (SOURCES >> RANK) & 1:
        for i in range(i_b, num_tiles, num_b):
            o_word = i * TILE + tl.arange(0, TILE)
            m_word = o_word < words
            b_word = tl.load(p_from + o_word, mask=m_word)
            if GIVES:
                tl.store(tl.multiple_of(p_own + o_slot + o_word, 16), b_word, mask=m_word)
            if (SOURCES >> RANK) & 1:
                tl.store(p_to + RANK * words + o_word, b_word, mask=m_word)
    if GIVES:
        tl.debug_barrier()
        for i_step in tl.static_range(1, W):
            p_peer = _memory_of(p_peers, (RANK + i_step) % W)
            set_flag(p_peer + o_full + RANK, call)
    for i_step in tl.static_range(1, W):
        i_peer = (RANK + i_step) % W
        p_peer = _memory_of(p_peers, i_peer)
        if (SOURCES >> i_peer) & 1:
            wait_for_flag(p_own + o_full + i_peer, call, i_peer, p_page, p_late, LIMITED)
            tl.debug_barrier()
            for i in range(i_b, num_tiles, num_b):
                o_word = i * TILE + tl.arange(0, TILE)
                m_word = o_word < words
                p_word = tl.multiple_of(p_peer + o_slot + o_word, 16)
                b_word = tl.load(p_word, mask=m_word, cache_modifier=".cv")
                tl.store(p_to + i_peer * words + o_word, b_word, mask=m_word)
            tl.debug_barrier()
        set_flag(p_peer + o_read + RANK, call)
    tl.store(p_own + i_b, call)
