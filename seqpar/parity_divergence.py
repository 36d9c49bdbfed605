"""Where a wrapped model begins to differ from one device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.adapters.hf_models import hugging_face_model
from seqpar.batch import Batch, unshard
from seqpar.comm import all_gather_objects
from seqpar.parity_reference import documents_of, run_document, whole_stream

__all__ = ["Divergence", "first_divergence"]


@dataclass(frozen=True)
class Divergence:
    """The first module that differs, in the order that one device runs them.

    Attributes:
        module: its name in the model.
        kind: "output" if its forward output differs; "gradient" if every output agrees, and it is
            the first in backward order whose parameters' gradients differ.
        error: of the worst token (output), or of the worst parameter (gradient).
    """

    module: str
    kind: str
    error: float


def first_divergence(
    model: nn.Module,
    reference_model: nn.Module,
    batch: Batch,
    *,
    gradient_errors: Mapping[str, float],
    tolerance: float,
) -> Divergence | None:
    """Run both forwards again with every module's output recorded. Collective over the group.

    Args:
        model, reference_model: the wrapped one, and a copy that is not.
        gradient_errors: by parameter, relative: for when every output agrees.
        tolerance: of outputs (the worst token) and gradients.
    """
    held = batch.ids.shape[1]
    # A Hugging Face model runs one token, which counts for nothing, on a rank that holds none.
    shown = held if hugging_face_model(model) is None else max(held, 1)
    mine = _recorded(model, shown, functools.partial(model, **batch.inputs))
    theirs: dict[str, list[Tensor]] = {}
    for document in documents_of(whole_stream(batch)):
        run = functools.partial(run_document, reference_model, document)
        for name, output in _recorded(reference_model, document.num_tokens, run).items():
            theirs.setdefault(name, []).append(output)
    common = _common_names(set(mine) & set(theirs), batch)
    for name, parts in theirs.items():
        if name in common:
            error = _worst_token(unshard(mine[name][:held], batch, dim=0), torch.cat(parts))
            if error > tolerance:
                return Divergence(name, "output", error)
    wrong = {name: error for name, error in gradient_errors.items() if error > tolerance}
    return _last_gradient(list(theirs), wrong)


def _common_names(names: set[str], batch: Batch) -> set[str]:
    """The modules that every rank of the group has recorded."""
    return set.intersection(*all_gather_objects(names, batch.group))


def _recorded(model: nn.Module, num_tokens: int, run: Callable[[], Any]) -> dict[str, Tensor]:
    """[T, ...] outputs by module name, in the order that modules finish; first calls only."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tokens_first = _tokens_first(output, num_tokens)
            if tokens_first is not None and name not in outputs:
                outputs[name] = tokens_first.detach()

        return hook

    handles = [m.register_forward_hook(record(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _tokens_first(output: Any, num_tokens: int) -> Tensor | None:
    """A module's output as [T, ...]; None if it does not hold one entry a token."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "last_hidden_state", output)
    if not isinstance(output, Tensor):
        return None
    if output.ndim >= 3 and output.shape[:2] == (1, num_tokens):
        return output[0]
    return output if output.ndim >= 2 and output.shape[0] == num_tokens else None


def _worst_token(found: Tensor, reference: Tensor) -> float:
    if found.shape != reference.shape:
        return math.inf
    found, reference = found.double().flatten(1), reference.double().flatten(1)
    if not bool(torch.isfinite(found).all()):
        return math.inf
    size = float(reference.norm(dim=1).max())
    difference = float((found - reference).norm(dim=1).max())
    return difference / size if size else difference


def _last_gradient(order: list[str], wrong: dict[str, float]) -> Divergence | None:
    """Backward runs in reverse: of the modules whose gradients differ, the last in forward."""
    rank = {module: index for index, module in enumerate(order)}
    owners = [(rank.get(name.rpartition(".")[0], -1), error, name) for name, error in wrong.items()]
    if not owners:
        return None
    _, error, name = max(owners)
    return Divergence(name.rpartition(".")[0] or name, "gradient", error)
