# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Flags between devices: set one, and wait for one, though not for ever.

Legend: i_ index, p_ pointer.

What a rank may wait for and how long is on a page of host memory (`seqpar.peers.memory_limit`),
which is read only by those who have waited for about a millisecond: who finds the flag set pays
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

__all__ = ["set_flag", "wait_for_flag"]

_POLLS = tl.constexpr(1024)
"""Between two looks at the clock; a poll takes about a microsecond."""
_NOTICE_NS = tl.constexpr(2_000_000_000)
"""From the report to the trap: what the host has to read it."""


@triton.jit
def set_flag(p_flag, call):
    """The flag shows a call to all devices, after all that this program wrote or read before."""
    tl.atomic_xchg(p_flag, call, sem="release", scope="sys")


@triton.jit
def _is_behind(p_flag, call):
    return tl.atomic_add(p_flag, 0, sem="acquire", scope="sys") - call < 0


@triton.jit
def wait_for_flag(p_flag, call, i_peer, p_page, p_late, LIMITED: tl.constexpr):
    """Until the flag has reached a call; then what was written before it was set can be read.

    Args:
        i_peer: who sets it.
        p_page: the page of the wait's limit.
        p_late: a word of this program's own, zero until it has given up.
        LIMITED: whether there is a limit; there is no clock under the interpreter.
    """
    if LIMITED:
        polls, gave_up = 0, 0
        start = tl.full((), 0, tl.int64)
        while _is_behind(p_flag, call) & (gave_up == 0):
            polls += 1
            if polls % _POLLS == 0:
                now = globaltimer()
                start = tl.where(start == 0, now, start)
                # The threads' clocks differ: the atomic's is one thread's, and all see its result.
                late = now - start > tl.load(p_page + 2)
                tl.atomic_or(p_late, late.to(tl.int32))
                gave_up = tl.atomic_or(p_late, 0)
        if gave_up != 0:
            _give_up(call, i_peer, p_page)
    else:
        while _is_behind(p_flag, call):
            pass


@triton.jit
def _give_up(call, i_peer, p_page):
    """Report who did not arrive; then end the process, if that is wanted."""
    tl.store(p_page + 1, call.to(tl.int64))
    tl.store(p_page, i_peer + 1)
    if tl.load(p_page + 3) != 0:
        until = globaltimer() + _NOTICE_NS
        while globaltimer() < until:
            pass
        tl.inline_asm_elementwise(
            "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
