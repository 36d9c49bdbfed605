"""What a wrapped model was given at wrap time, and how a call's layout is admitted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqpar.adapters.sequence import SequenceContext, outside_graph
from seqpar.comm import agree, group_size
from seqpar.errors import LayoutError, SeqparError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Strategy

__all__ = ["MARK", "Bound", "Wrapping", "replace_forward", "restore_forward", "wrapping_of"]

MARK = "_seqpar_wrapping"
_PREVIOUS = "_seqpar_previous_forward"


class Bound:
    """Stands for what was bound at wrap time (a class: copies of a model share it)."""


@dataclass(frozen=True, eq=False)
class Wrapping:
    """What a wrapped model was given at wrap time; the same value for its copies."""

    group: ProcessGroup | None
    strategy: Strategy
    exchange: str
    check: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapping:
        return self

    def __reduce__(self) -> NoReturn:
        """A pickled model would come back without its group and with its own forwards."""
        raise SeqparError(
            "a wrapped model cannot be pickled, for its ranks and replaced forwards belong to this "
            "process: save model.state_dict(), or seqpar.unparallelize(model) first"
        )

    @outside_graph
    def context(
        self,
        layout: SequenceLayout | None,
        group: Any,
        tokens: Tensor | None,
        *,
        strategy: Strategy | None = None,
        source_layout: SequenceLayout | None = None,
        source_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        problem: str | None = None,
    ) -> SequenceContext:
        """The call's context, or a LayoutError on all ranks alike.

        Args:
            layout, group, tokens: of the call; a group that is `Bound` is the wrapped model's.
            strategy: of the call; the wrapped model's by default.
            source_layout, source_tokens: the encoder's, in an encoder-decoder model.
            positions: the call's position ids, if it has any; compared with the layout's.
            problem: what this rank has found wrong with the call already.
        """
        group = self.group if group is Bound else group
        if layout is None:
            problem = problem or (
                "a wrapped model needs the layout of its batch: call model(**batch.inputs) with a "
                "batch from seqpar.shard"
            )
            layout = SequenceLayout.contiguous((0,), group_size(group))
        sequence = SequenceContext(
            layout, group, strategy or self.strategy, self.exchange, source_layout
        )
        problem = problem or _misfit(layout, sequence, tokens)
        if positions is not None and self.check:
            problem = problem or _misplaced(sequence, positions)
        if source_layout is not None:
            problem = problem or _misfit(source_layout, sequence, source_tokens)
            sources, targets = source_layout.num_documents, layout.num_documents
            if sources != targets:
                problem = problem or f"{sources} sources but {targets} targets: use pack_pairs"
        if group is not None and self.check:
            agree(problem, group, same=(layout, source_layout, strategy))
        elif problem is not None:
            raise LayoutError(problem)
        return sequence


def wrapping_of(model: nn.Module) -> Wrapping:
    """What `parallelize` left on the model that it wrapped."""
    wrapping: Wrapping = model.__dict__[MARK]
    return wrapping


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Set an instance's forward; copies of the module get one bound to themselves.

    Args:
        forward: called with the module, its inputs, and its own forward as `original`.
    """
    previous = module.__dict__.get("forward", Bound)

    @functools.wraps(module.forward)
    def replaced(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        before = self.__dict__[_PREVIOUS]
        own = functools.partial(type(self).forward, self)
        original = own if before is Bound else before
        return forward(self, *args, original=original, **inputs)

    module.__dict__[_PREVIOUS] = previous
    module.__dict__["forward"] = MethodType(replaced, module)


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`, if it was done."""
    previous = module.__dict__.pop(_PREVIOUS, None)
    if previous is None:
        return
    module.__dict__.pop("forward")
    if previous is not Bound:
        module.__dict__["forward"] = previous


def _misfit(layout: SequenceLayout, sequence: SequenceContext, tokens: Tensor | None) -> str | None:
    """What does not fit together in this rank's call; None if nothing."""
    ranks, size = layout.world_size, group_size(sequence.group)
    if ranks != size:
        return (
            f"the layout is for {ranks} ranks but the group has {size}: shard the batch over the "
            "mesh that the model was wrapped with"
        )
    if tokens is None or tokens.ndim < 2 or tokens.shape[0] != 1:
        shape = None if tokens is None else tuple(tokens.shape)
        return f"a wrapped model takes one packed stream, input_ids [1, T], got shape {shape}"
    if tokens.shape[1] != layout.tokens_on(sequence.rank):
        return (
            f"this rank has {tokens.shape[1]} tokens but the layout gives it "
            f"{layout.tokens_on(sequence.rank)}: pass the batch that seqpar.shard made"
        )
    return None


def _misplaced(sequence: SequenceContext, positions: Tensor) -> str | None:
    """Whether position ids are not the layout's; on CUDA the host waits for the answer."""
    expected = sequence.layout.position_ids(sequence.rank)[None]
    if positions.shape == expected.shape and torch.equal(positions, expected.to(positions.device)):
        return None
    return (
        "position_ids are not the layout's, which counts every document from 0 whatever the rank: "
        "pass the batch that seqpar.shard made, or parallelize(..., check=False) for positions of "
        "your own"
    )
