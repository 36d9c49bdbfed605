"""One rank's part of a scattered mixer: everything but the communication.

Legend: B batch, T tokens on this rank, R runs (parts of documents) of a row, D documents.

The kernels see R runs a row as B*R sequences. Of a link (a span), what enters goes to its first
run, and what leaves comes from its last; all other runs begin or end their documents here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.ops.state_chain import LinkState, decayed
from seqpar.ops.state_mixer import Inputs, Mixer, Summary
from seqpar.ops.state_places import RankPlaces
from seqpar.ops.state_plan import RankPlan, plan_for
from seqpar.ops.state_scan import Entries, Scan

__all__ = ["RankPart"]


@dataclass(frozen=True)
class RankPart:
    """The plain functions of one rank; `inputs` are its local tensors [B, T, ...] throughout."""

    mixer: Mixer
    plan: RankPlan

    @classmethod
    def of(
        cls,
        mixer: Mixer,
        layout: SequenceLayout,
        rank: int,
        inputs: Inputs,
        *,
        overlap: bool = True,
        whole: bool = False,
    ) -> RankPart:
        """The part of a rank that holds these inputs."""
        kind = mixer.kind(inputs)
        return cls(mixer, plan_for(kind, layout, rank, inputs, overlap=overlap, whole=whole))

    @property
    def places(self) -> RankPlaces:
        """Where links, runs and documents stand in this rank's tensors."""
        return self.plan.places

    def no_states(self) -> Tensor:
        """Zeros [B, D, *state_shape]."""
        plan = self.plan
        shape = (plan.batch, plan.layout.num_documents, *plan.kind.state_shape)
        return torch.zeros(shape, dtype=plan.state_dtype, device=plan.device)

    def empty_output(self, inputs: Inputs) -> Tensor:
        """Uninitialised memory of the output's shape and dtype."""
        return inputs[0].new_empty(*inputs[0].shape[:2], *self.plan.kind.output_shape)

    # -- forward ------------------------------------------------------------------------------

    def summarize(self, inputs: Inputs) -> Summary | None:
        """S and G of every run; None on a rank without tokens."""
        if self.plan.is_empty:
            return None
        return self.mixer.summarize(*self._folded(inputs))

    def forward_scan(
        self, inputs: Inputs, summary: Summary | None, initial_state: Tensor | None
    ) -> Scan:
        """What this rank brings to the exchange of states."""
        last_run = self.places.last_run
        own = {x: self._link_state(summary, last_run[x]) for x in self.places.links}
        if initial_state is not None and 0 in own and self.places.initial_passes:
            item = self._run_state(summary, last_run[0])
            state = item.state + decayed(initial_state, item.log_transition)
            own[0] = LinkState(state, own[0].log_transition)
        return Scan(self.plan.forward_scan, own, self.mixer.log_decay_per_token)

    def entries(self, received: Entries, initial_state: Tensor | None) -> Entries:
        """By link: the states that enter, the stream's initial state among them."""
        if initial_state is not None and 0 in self.places.links:
            return {**received, 0: initial_state}
        return received

    def output(self, inputs: Inputs, summary: Summary | None, entries: Entries) -> Tensor:
        """o [B, T, ...] from the states that enter the links."""
        if summary is None:
            return self.empty_output(inputs)
        folded, cu_seqlens = self._folded(inputs)
        entry = self._at_runs({self.places.first_run[x]: e for x, e in entries.items()}, summary)
        o = self.mixer.output(folded, summary, entry, cu_seqlens)
        return o if cu_seqlens is None else o.reshape(*inputs[0].shape[:2], *o.shape[2:])

    def add_entries(self, o: Tensor, inputs: Inputs, received: Entries) -> None:
        """Add to o, in place, what states that arrived after the local work contribute."""
        for link, entry in received.items():
            part = self.places.tokens_of_run(self.places.first_run[link])
            self.mixer.add_entry(o[:, part], tuple(x[:, part] for x in inputs), entry)

    def final_states(self, inputs: Inputs, summary: Summary | None, entries: Entries) -> Tensor:
        """[B, D, *state_shape]: the state after each document that ends here, zero elsewhere."""
        finals = self.no_states()
        if summary is None:
            return finals
        entering = {self.places.first_run[x]: e for x, e in entries.items()}
        for run, document in self.places.ending_runs:
            if run in entering:
                item = self._run_state(summary, run)
                finals[:, document] = item.state + decayed(entering[run], item.log_transition)
            else:
                finals[:, document] = self._at_run(summary.state, run)
        return finals

    # -- backward -----------------------------------------------------------------------------

    def summarize_grad(
        self, inputs: Inputs, do: Tensor, summary: Summary | None, entries: Entries
    ) -> Summary | None:
        """By run: the gradient of the entering state through the local outputs alone."""
        if summary is None:
            return None
        folded, cu_seqlens = self._folded(inputs)
        entry = self._at_runs({self.places.first_run[x]: e for x, e in entries.items()}, summary)
        return self.mixer.summarize_grad(folded, self._fold(do), summary, entry, cu_seqlens)

    def backward_scan(
        self, inputs: Inputs, grad_summary: Summary | None, dfinals: Tensor | None
    ) -> Scan:
        """What this rank brings to the exchange of gradients, on the reversed chain."""
        own = {}
        for link in self.places.links:
            run = self.places.first_run[link]
            item = self._link_state(grad_summary, run)
            if dfinals is not None and run in self.places.ending_document:
                through = self._run_state(grad_summary, run).log_transition
                added = decayed(dfinals[:, self.places.ending_document[run]], through)
                item = LinkState(item.state + added, item.log_transition)
            own[self.places.mirror(link)] = item
        return Scan(self.plan.backward_scan, own, self.mixer.log_decay_per_token)

    def exit_grads(self, received: Entries) -> Entries:
        """What the exchange on the reversed chain delivered, by link of the forward chain."""
        return {self.places.mirror(link): grad for link, grad in received.items()}

    def backward(
        self,
        inputs: Inputs,
        do: Tensor,
        summary: Summary | None,
        grad_summary: Summary | None,
        entries: Entries,
        exit_grads: Entries,
        dfinals: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the local inputs."""
        if summary is None or grad_summary is None:
            return tuple(torch.zeros_like(x) for x in inputs)
        leaving = {self.places.last_run[x]: grad for x, grad in exit_grads.items()}
        if dfinals is not None:
            for run, document in self.places.ending_runs:
                leaving[run] = dfinals[:, document]
        entering = {self.places.first_run[x]: e for x, e in entries.items()}
        folded, cu_seqlens = self._folded(inputs)
        grads = self.mixer.backward(
            folded,
            self._fold(do),
            summary,
            grad_summary,
            self._at_runs(entering, summary),
            self._at_runs(leaving, summary),
            cu_seqlens,
        )
        if self.places.num_runs == 1:
            return grads
        return tuple(
            None if grad is None else grad.reshape(x.shape)
            for grad, x in zip(grads, inputs, strict=True)
        )

    def add_exit_grads(
        self, grads: tuple[Tensor | None, ...], inputs: Inputs, exit_grads: Entries
    ) -> None:
        """Add to the gradients, in place, what gradients of leaving states contribute."""
        for link, grad in exit_grads.items():
            part = self.places.tokens_of_run(self.places.last_run[link])
            cut = tuple(None if x is None else x[:, part] for x in grads)
            self.mixer.add_exit_grad(cut, tuple(x[:, part] for x in inputs), grad)

    def initial_state_grad(
        self, grad_summary: Summary | None, exit_grads: Entries, dfinals: Tensor | None
    ) -> Tensor | None:
        """[B, *state_shape]: the gradient of the stream's initial state; None off its rank."""
        if grad_summary is None or 0 not in self.places.links:
            return None
        run = self.places.first_run[0]
        leaving = None
        if dfinals is not None and run in self.places.ending_document:
            leaving = dfinals[:, self.places.ending_document[run]]
        elif self.places.initial_passes:
            leaving = exit_grads.get(0)
        if leaving is None:
            return self._at_run(grad_summary.state, run)
        item = self._run_state(grad_summary, run)
        return item.state + decayed(leaving, item.log_transition)

    # -- between [B, T] with R runs and the kernels' sequences --------------------------------

    def _fold(self, x: Tensor) -> Tensor:
        if self.places.num_runs == 1 or x.shape[0] == 1:
            return x
        return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])

    def _folded(self, inputs: Inputs) -> tuple[Inputs, Tensor | None]:
        """Inputs as the mixer takes them, and the bounds of its sequences."""
        if self.places.num_runs == 1:
            return inputs, None
        bounds = self.places.sequence_bounds(inputs[0].shape[0])
        return tuple(self._fold(x) for x in inputs), bounds

    def _run_state(self, summary: Summary | None, run: int) -> LinkState:
        """One run's S and G, for every row."""
        assert summary is not None, "a rank with a link has tokens"
        state = self._at_run(summary.state, run)
        rate = self.mixer.log_decay_per_token
        if rate is not None:
            return LinkState(state, rate.double()[None] * self.places.runs[run].num_tokens)
        transition = summary.log_transition
        return LinkState(state, None if transition is None else self._at_run(transition, run))

    def _link_state(self, summary: Summary | None, run: int) -> LinkState:
        """A link's state from the run that it leaves, and G if it travels."""
        assert summary is not None, "a rank with a link has tokens"
        transition = summary.log_transition if self.plan.forward_scan.carries else None
        return LinkState(
            self._at_run(summary.state, run),
            None if transition is None else self._at_run(transition, run),
        )

    def _by_run(self, states: Tensor) -> Tensor:
        return states.view(-1, self.places.num_runs, *states.shape[1:])

    def _at_run(self, states: Tensor, run: int) -> Tensor:
        """[B, ...]: one run's part of [B*R, ...]."""
        return states if self.places.num_runs == 1 else self._by_run(states)[:, run]

    def _at_runs(self, values: dict[int, Tensor], summary: Summary) -> Tensor | None:
        """[B*R, *state_shape]: the values at their runs, zero elsewhere; None for no values."""
        if not values:
            return None
        if self.places.num_runs == 1:
            return values[0].contiguous()
        states = torch.zeros_like(summary.state)
        for run, value in values.items():
            self._by_run(states)[:, run] = value
        return states
