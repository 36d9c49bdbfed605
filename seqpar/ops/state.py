"""Chunked-state sequence parallelism: lightning attention, and any mixer with a fixed-size state.

Legend: B batch, T tokens on this rank, N tokens of the stream, H heads, K key dim, V value dim,
D documents, W ranks.

A rank computes its tokens as if nothing came before them, sends what they do to a state, and adds
what the states from other ranks contribute. Backward is the same with time reversed. What travels
is of the size of a state, whatever the number of tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.errors import LayoutError
from seqpar.kernels.as_given import as_given
from seqpar.kernels.lightning.plan import dense
from seqpar.kernels.recorded_call import RecordedCall
from seqpar.layout import SequenceLayout
from seqpar.ops.state_auto import choose_for, default_link
from seqpar.ops.state_call import CallPlan, call_plan, misfit
from seqpar.ops.state_check import agree_on_call
from seqpar.ops.state_job import Kept, StateJob
from seqpar.ops.state_lightning import LightningMixer, fixed_on_host
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import Mixer
from seqpar.ops.state_recorded import recorded_call
from seqpar.ops.state_saved import put_tensors, take_tensors
from seqpar.ops.state_steps import backward_steps, forward_steps
from seqpar.ops.steps import run_steps
from seqpar.planners.exchange import ExchangeChoice, Link

__all__ = ["explain_exchange", "scatter_mixer", "state_attention"]


def state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    exchange: str = "auto",
    truncate: bool = True,
    overlap: bool | None = None,
    link: Link | None = None,
    check: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention of this rank's tokens of a stream that is scattered over a group.

    S_t = exp(g_t) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t, restarting at each document: the same numbers
    as one device. There is no scale: scale q. States are float32 throughout.

    Args:
        q, k: [B, T, H, K], this rank's shard by `layout`; float16, bfloat16 or float32.
        v: [B, T, H, V]. Every row of the batch has the same layout.
        log_decay: natural logarithms <= 0: None (no decay), [H] float32 (fixed per head, a
            constant), or [B, T, H] float32 (per token, sharded like q).
        layout: where each token of the stream lives; the same value on every rank.
        group: its ranks, in the layout's order; None for one rank alone.
        initial_state: [H, K, V] or [B, H, K, V], the state before the stream's first document,
            given on every rank. Its gradient is the sum of the ranks' gradients (all but one are
            zero, or each has its heads).
        return_final_state: also return the state after each document, on every rank. What ranks
            put in as gradients of it is summed.
        exchange: how states travel: all_gather, chain, pipelined_chain, log_step, all_to_all (by
            heads), or auto: the least estimate of `seqpar.planners.exchange` for `link`.
            `explain_exchange` gives the choice to print.
        truncate: with a fixed decay, leave out what has decayed under 2^-24: such heads are not
            sent further, and tokens that a state no longer reaches are not touched. Exact to
            float32, unless a state is millions of times what comes after it.
            `comm.count_traffic` reports the bytes saved. Reads log_decay on the host, once for each
            tensor and version of it.
        overlap: with `truncate`, compute as if no state entered while states travel, and add
            their part to the few tokens that they reach; False waits for them first. None:
            where the exchange is estimated to take longer than the adding.
        link: figures of what joins the ranks, for auto; by default those of the group's backend.
        check: refuse what does not fit the layout, the kernels or the other ranks on all ranks
            alike, at the cost of one all_gather of 16 bytes a rank that the host waits for. Without
            it, a rank that refuses its input leaves the others waiting.

    Returns:
        o [B, T, H, V] in v's dtype, and None or the final states [B*D, H, K, V] in float32, row b's
        document d at b*D + d.

    Raises:
        LayoutError: shapes that do not fit the layout, a fixed decay over 1, ranks that were given
            different options, decays or shapes, or what another rank cannot take.
        KernelInputError: dtypes or dims that the kernels cannot take.

    Source: Qin et al., arXiv 2405.17381 (the recurrence); LASP, arXiv 2404.02882; LASP-2,
    arXiv 2502.07563.
    """
    call = None
    alone = initial_state is None and not return_final_state and not check
    if alone and group is not None and q.is_cuda and not torch.cuda.is_current_stream_capturing():
        options = (exchange, truncate, overlap, link)
        call = recorded_call(q, k, v, log_decay, layout, group, options)
        if call is not None and call.is_ready:
            return call(q, k, v, log_decay), None
    mixer, inputs = _lightning(q, k, v, log_decay, truncate)
    states = (initial_state, return_final_state)
    plan = _plan(mixer, inputs, layout, group, states, exchange, overlap, link, check)
    return _scatter(mixer, inputs, plan, group, initial_state, return_final_state, call)


def scatter_mixer(
    mixer: Mixer,
    *inputs: Tensor,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    exchange: str = "auto",
    overlap: bool | None = None,
    link: Link | None = None,
    check: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Any mixer with a fixed-size state, scattered: `state_attention` for layers of your own.

    Args:
        mixer: the mathematics on one device; see `seqpar.ops.state_mixer.Mixer`.
        inputs: tensors [B, T, ...] of this rank's tokens, as the mixer takes them.

    The other arguments, results and errors are those of `state_attention`, with the mixer's state
    shape in place of (H, K, V).
    """
    states = (initial_state, return_final_state)
    plan = _plan(mixer, inputs, layout, group, states, exchange, overlap, link, check)
    return _scatter(mixer, inputs, plan, group, initial_state, return_final_state, None)


def _plan(
    mixer: Mixer,
    inputs: tuple[Tensor, ...],
    layout: SequenceLayout,
    group: ProcessGroup | None,
    states: tuple[Tensor | None, bool],
    exchange: str,
    overlap: bool | None,
    link: Link | None,
    check: bool,
) -> CallPlan:
    """What the call is to do, or its refusal: on all ranks alike if they check.

    `states`: the initial state, and whether final states are returned.
    """
    initial_state, return_final_state = states
    plan = call_plan(
        mixer.kind(inputs),
        layout,
        (comm.group_size(group), comm.group_rank(group)),
        tuple([(x.shape, x.dtype) for x in inputs]),
        inputs[0].device,
        None if initial_state is None else initial_state.shape,
        exchange,
        overlap,
        link or default_link(group),
        comm.shared_bytes(group),
    )
    if check:
        agree_on_call(
            plan,
            mixer,
            inputs,
            layout,
            group,
            initial_state,
            exchange=exchange,
            return_final_state=return_final_state,
        )
    elif plan.problem is not None:
        raise LayoutError(plan.problem)
    return plan


def _scatter(
    mixer: Mixer,
    inputs: tuple[Tensor, ...],
    plan: CallPlan,
    group: ProcessGroup | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    call: RecordedCall | None,
) -> tuple[Tensor, Tensor | None]:
    assert plan.rank_plan is not None
    scan = plan.rank_plan.backward_scan
    late = comm.shares_memory(group, scan.numel * scan.dtype.itemsize)
    job = StateJob(RankPart(mixer, plan.rank_plan), plan.exchange, return_final_state, late)
    start = None
    if initial_state is not None:
        shape, dtype = plan.rank_plan.state_shape, plan.rank_plan.state_dtype
        start = initial_state.expand(shape).to(dtype)
    o, finals = _ScatteredMixer.apply(  # type: ignore[no-untyped-call]
        job, group, call, start, *inputs
    )
    return o, finals.flatten(0, 1) if return_final_state else None


def explain_exchange(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    truncate: bool = True,
    link: Link | None = None,
) -> ExchangeChoice:
    """What `state_attention` with `exchange="auto"` uses for these arguments, and why; print it.

    Communicates nothing, so with group=None and a `link` it also plans for ranks that are not here:
    the arguments are then rank 0's. They are those of `state_attention`.

    Raises:
        LayoutError: shapes that do not fit the layout.
    """
    mixer, inputs = _lightning(q, k, v, log_decay, truncate)
    rank = comm.group_rank(group)
    if (problem := misfit([x.shape for x in inputs], layout.tokens_on(rank), rank)) is not None:
        raise LayoutError(problem)
    rows = tuple((x.shape, x.dtype) for x in inputs)
    return choose_for(mixer.kind(inputs), layout, rows, link or default_link(group))


def _lightning(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, truncate: bool
) -> tuple[LightningMixer, tuple[Tensor, ...]]:
    if log_decay is not None and log_decay.ndim == 3:
        return LightningMixer(per_token=True), (q, k, v, log_decay)
    on_host = fixed_on_host(log_decay) if truncate and log_decay is not None else None
    return LightningMixer(log_decay=log_decay, on_host=on_host), (q, k, v)


class _ScatteredMixer(torch.autograd.Function):
    """
    |          | in (local)                | out (local)               | communication            |
    | forward  | inputs [B, T, ...],       | o [B, T, ...], finals     | states, along the chain; |
    |          | initial [B, *state]       | [B, D, *state]            | all_reduce of finals     |
    | backward | do, dfinals               | dinputs, dinitial         | the same, reversed       |

    Saves the inputs, the states that entered, the summary of the local tokens and a fixed decay, as
    a repeated call does. Bytes received are those of the exchange's own docstring, each way, and
    where final states are asked for 2 (W - 1) / W * 4 * B * D * state more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        job: StateJob,
        group: ProcessGroup | None,
        call: RecordedCall | None,
        initial_state: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        given = (*inputs, job.part.mixer.log_decay_per_token)[:4]
        recorder = None if call is None else call.recorder(given)
        with recorder or nullcontext(), as_given(inputs[0].device):
            done = run_steps(forward_steps(job, inputs, initial_state), group)
        kept = done.kept
        saved = [*kept.inputs, *kept.entries.values()]
        ctx.num_inputs, ctx.links = len(kept.inputs), tuple(kept.entries)
        ctx.summary = take_tensors(kept.summary, saved)
        ctx.decay = take_tensors(job.part.mixer.log_decay_per_token, saved)
        ctx.save_for_backward(*saved)
        ctx.job, ctx.group, ctx.call = job, group, call
        ctx.initial = None if initial_state is None else (initial_state.shape, initial_state.dtype)
        ctx.traffic = comm.current_traffic()
        if call is not None:
            ctx.trace = call.forward_ended(recorder, [done.o], saved)
        return done.o, done.final_states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinals: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them here
        inputs = saved[: ctx.num_inputs]
        entries = dict(zip(ctx.links, saved[ctx.num_inputs :], strict=False))
        kept = Kept(inputs, put_tensors(ctx.summary, saved), entries)
        wanted = ctx.needs_input_grad[3]
        recorder = None
        if ctx.call is not None and ctx.trace is not None:
            do = dense(do)
            used = list(saved)
            if ctx.decay is not None:  # the mixer reads its own, which a hook leaves where it is
                used[ctx.decay.index] = ctx.job.part.mixer.log_decay_per_token
            recorder = ctx.call.backward_recorder(used, do)
        steps = backward_steps(ctx.job, kept, do, dfinals, wants_initial_grad=wanted)
        with comm.count_into(ctx.traffic), recorder or nullcontext(), as_given(do.device):
            dinputs, dinitial = run_steps(steps, ctx.group)
        if ctx.call is not None:
            ctx.call.backward_ended(ctx.trace, recorder, (*dinputs, None)[:4])
        if not wanted:
            return None, None, None, None, *dinputs
        if dinitial is None:
            shape, dtype = ctx.initial
            dinitial = torch.zeros(shape, dtype=dtype, device=do.device)
        return None, None, None, dinitial, *dinputs
