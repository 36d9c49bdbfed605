# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Launches that begin while the one before them ends (programmatic dependent launch).

Between two launches of a stream the device stands still for some microseconds: the last programs
of the first end at different times, then the second is started, and its programs read what they
are to do. A launch with this attribute puts programs on multiprocessors as they become free; each
must wait, before it touches anything that another launch may write or read, until all launches
before it have ended. What it may read earlier are tables that never change.

The wait is for the launch before, all of whose programs have waited for the one before that: so
every program of such a kernel must wait, whatever it does. It lets the next launch in when it has
waited, not sooner: when a launch begins, all but the one before it have then ended. So

- a pass whose inputs the launch before does not write may read them before it waits;
- a pass that has nothing to do with the launch before, what it reads, writes and was given as
  memory, may run beside it and wait at its end: whoever waits for the pass has then waited for
  both. It lets the next launch in when it begins, so that one must wait first, or be such that
  neither of the two concerns it before it waits.

So of launches A, B, C in a row with C late, C may read what A wrote exactly if B waits before it
lets C in: if B is late too, A may still be writing. In backward A is dq, B dv and C dk, which reads
what dq's pass sums for the decays' gradient, and the states that leave its segments.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["begin_beside", "can_overlap", "end_after_launches_before", "wait_for_launches_before"]


@lru_cache(maxsize=64)
def can_overlap(device: torch.device) -> bool:
    """Whether launches on this device may begin before the one before them has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_launches_before(OVERLAP: tl.constexpr):
    """Wait until the launches before this one have ended; the next one may begin from now on."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def begin_beside(LATE: tl.constexpr):
    """Let the next launch in: this one waits at its end."""
    if LATE:
        gdc_launch_dependents()


@triton.jit
def end_after_launches_before(LATE: tl.constexpr):
    """Wait, at the end of a program, until the launches before have ended."""
    if LATE:
        gdc_wait()
