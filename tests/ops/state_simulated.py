"""The state operator of all ranks in one process, and whether it has the one-device truth."""

from __future__ import annotations

from dataclasses import replace

import torch

from seqpar.layout import SequenceLayout
from seqpar.ops.state_job import StateJob
from seqpar.ops.state_lightning import LightningMixer, fixed_on_host
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_steps import backward_steps, forward_steps
from tests.ops.cases import Stream, Truth
from tests.simulator import simulate
from tests.tolerances import assert_close


def simulated(
    stream: Stream,
    layout: SequenceLayout,
    exchange: str,
    *,
    truncate: bool = False,
    whole: bool = False,
    overlap: bool = True,
    asks_finals: bool = True,
) -> Truth:
    """The plain functions of all ranks in one process, put together to the whole stream.

    Rank 0 alone puts in gradients of the final states, if they are asked for.
    """
    per_token = stream.log_decay is not None and stream.log_decay.ndim == 3
    mixer = LightningMixer(None if per_token else stream.log_decay, per_token)
    if truncate and stream.log_decay is not None:
        mixer = replace(mixer, on_host=fixed_on_host(stream.log_decay))
    ranks = range(layout.world_size)
    inputs = [tuple(layout.shard(x, rank) for x in stream.tensors) for rank in ranks]
    parts = [RankPart.of(mixer, layout, r, inputs[r], overlap=overlap, whole=whole) for r in ranks]
    jobs = [StateJob(part, exchange, asks_finals) for part in parts]
    done = simulate([forward_steps(jobs[r], inputs[r], stream.initial) for r in ranks])
    dfinals = stream.dfinals.view(stream.q.shape[0], layout.num_documents, 3, 4, 5)
    given = [dfinals * (r == 0) if asks_finals else None for r in ranks]
    dos = [layout.shard(stream.do, r) for r in ranks]
    back = simulate([backward_steps(jobs[r], done[r].kept, dos[r], given[r]) for r in ranks])
    finals = [item.final_states for item in done]
    assert all(torch.equal(x, finals[0]) if asks_finals else x is None for x in finals)
    grads = tuple(
        layout.unshard([back[r][0][index] for r in ranks]) for index in range(len(stream.tensors))
    )
    initials = [back[r][1] for r in ranks if back[r][1] is not None]
    dinitial = torch.stack(initials).sum(0) if initials else None
    o = layout.unshard([done[r].o for r in ranks])
    return Truth(o, finals[0].flatten(0, 1) if asks_finals else None, grads, dinitial)


def check(found: Truth, expected: Truth, what: str, dtype: torch.dtype | None = None) -> None:
    assert_close(found.o, expected.o, what=f"{what}: o", dtype=dtype)
    if found.finals is not None:
        assert expected.finals is not None
        assert_close(found.finals, expected.finals, what=f"{what}: finals", dtype=dtype, dim=0)
    for name, grad, ref in zip(
        ("dq", "dk", "dv", "dlog_decay"), found.grads, expected.grads, strict=False
    ):
        assert_close(grad, ref, what=f"{what}: {name}", dtype=dtype)
    if expected.dinitial is not None:
        assert found.dinitial is not None
        assert_close(
            found.dinitial, expected.dinitial, what=f"{what}: dinitial", dtype=dtype, dim=0
        )
