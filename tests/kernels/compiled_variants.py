"""Prints how many variants of the lightning kernels Triton would compile: calibration's documents
first, then others of lengths that no layer has seen.

    TRITON_INTERPRET=0 python -m tests.kernels.compiled_variants

One state layer's forward and backward on every rank of balanced layouts, each launch recorded by
what Triton tells variants apart by, and not carried out: it needs no GPU. Tensors are never read.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

from seqpar.balance import balanced_layout
from seqpar.calibration import measured_shapes
from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning import plan
from seqpar.ops.state_lightning import LightningMixer
from seqpar.ops.state_local import RankPart

HEADS, DIM = 16, 128
VARIANTS: set[Any] = set()


def kind_of(parameter: Any, value: Any) -> Any:
    """What of an argument decides which variant runs it: triton.runtime.jit's specialisation."""
    if parameter.is_constexpr or value is None:
        return value
    if hasattr(value, "block_shape"):  # a descriptor, Triton's or Gluon's
        return value.base.dtype, tuple(value.block_shape)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return "any" if parameter.do_not_specialize else (value == 1, value % 16 == 0)


def record(launch: Any, *tensors: torch.Tensor) -> None:
    """In the place of `Launch.__call__`."""
    given = dict(zip(launch.names, tensors, strict=True))
    for name, window in launch._windows.items():
        given[name] = window.of(given[name])
    given |= launch._fixed
    kinds = tuple((p.name, kind_of(p, given[p.name])) for p in launch._kernel.params)
    VARIANTS.add((launch._kernel.fn.__name__, kinds, str(launch._options)))


def run_layer(lengths: list[int], degree: int) -> int:
    """Forward and backward on every rank; how many variants these lengths brought."""
    before = len(VARIANTS)
    log_decay = -(2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS))
    mixer = LightningMixer(log_decay=log_decay, on_host=tuple(log_decay.tolist()))
    layout = balanced_layout([0, *itertools.accumulate(lengths)], degree)
    for rank in range(degree):
        shape = (1, layout.tokens_on(rank), HEADS, DIM)
        q, k, v, do = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(4))
        part = RankPart.of(mixer, layout, rank, (q, k, v))
        links = {x: part.places.chain.links[x] for x in part.places.links}
        states = {x: torch.empty(1, HEADS, DIM, DIM) for x in links}
        entries = {x: states[x] for x, link in links.items() if link.takes}
        exits = {x: states[x] for x, link in links.items() if link.gives}
        summary = part.summarize((q, k, v))
        part.output((q, k, v), summary, entries)
        grads = part.summarize_grad((q, k, v), do, summary, entries)
        part.backward((q, k, v), do, summary, grads, entries, exits, None)
    return len(VARIANTS) - before


def main() -> None:
    Launch.__call__ = record  # type: ignore[method-assign, assignment]
    plan.Plan.on_triton = property(lambda _: True, lambda _, value: None)  # type: ignore[assignment]
    plan._num_sms = lambda _: 132  # an H200's
    plan.runs_by_hand = lambda _: True
    known = run_layer([512] * 16, 1)
    for degree in (1, 2):
        known += run_layer([64 * degree], degree)
        known += sum(
            run_layer(list(lengths), degree) for lengths in measured_shapes(degree, 24_576)
        )
    numbers = torch.Generator().manual_seed(0)
    new = 0
    for _ in range(40):
        count = int(torch.randint(1, 30, (), generator=numbers))
        lengths = torch.randint(2, 3000, (count,), generator=numbers).tolist()
        new += sum(run_layer(lengths, degree) for degree in (1, 2))
    print(json.dumps({"calibration": known, "new_lengths": new}))


if __name__ == "__main__":
    main()
