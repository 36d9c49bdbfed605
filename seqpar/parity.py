"""The one call that compares a wrapped model with one device.

The reference is the unwrapped model on whole documents, each by itself on one device: no packing,
no layout, no exchange, torch's own cross-entropy. So a leak between documents, a wrong
position, a lost key or a loss off by the group's size all show.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from seqpar.batch import Batch, PackedStream
from seqpar.comm import all_gather_objects, all_reduce_sum, group_rank
from seqpar.errors import DataError, ParityError
from seqpar.layout import IGNORE_INDEX
from seqpar.loss import token_loss
from seqpar.parity_comparable import (
    check_comparable,
    check_drew_nothing,
    check_same_weights,
    random_state,
)
from seqpar.parity_divergence import Divergence, first_divergence
from seqpar.parity_reference import (
    documents_of,
    logits_and_labels,
    run_document,
    whole_stream,
)
from seqpar.wrap import unparallelize

__all__ = ["Divergence", "ParityReport", "check_parity"]

_SMALL_GRADIENT = 1e-3


@dataclass(frozen=True)
class ParityReport:
    """How far a wrapped model is from one device; the same on every rank.

    Attributes:
        loss, reference_loss: nats a token, means over all target tokens of the mesh.
        gradient_errors: by parameter, ‖gradient - reference‖ / ‖reference‖. Where a reference is
            under 1e-3 of the model's root mean square gradient (a bias that softmax cancels), it
            is relative to that instead: noise is not compared with noise.
        loss_tolerance, gradient_tolerance: what was allowed.
        divergence: the first module that differs, if the comparison failed.
    """

    loss: float
    reference_loss: float
    gradient_errors: dict[str, float] = field(repr=False)
    loss_tolerance: float
    gradient_tolerance: float
    divergence: Divergence | None = None

    @property
    def loss_error(self) -> float:
        """Relative error of the loss."""
        if not math.isfinite(self.loss):
            return math.inf
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), 1e-30)

    @property
    def worst_parameter(self) -> str:
        return max(self.gradient_errors, key=lambda name: self.gradient_errors[name], default="")

    @property
    def gradient_error(self) -> float:
        """The largest of `gradient_errors`."""
        return max(self.gradient_errors.values(), default=0.0)

    @property
    def ok(self) -> bool:
        return (
            self.loss_error <= self.loss_tolerance
            and self.gradient_error <= self.gradient_tolerance
        )

    def summary(self) -> str:
        """One line: both errors against their tolerances, and where they begin."""
        text = (
            f"loss {self.loss:.6f} against {self.reference_loss:.6f} on one device "
            f"(relative error {self.loss_error:.1e}, allowed {self.loss_tolerance:.0e}); "
            f"worst gradient {self.worst_parameter} "
            f"({self.gradient_error:.1e}, allowed {self.gradient_tolerance:.0e})"
        )
        if self.divergence is None:
            return text
        where = self.divergence
        return f"{text}; first to diverge: {where.kind} of {where.module} ({where.error:.1e})"


def check_parity(
    model: nn.Module,
    batch: Batch,
    mesh: DeviceMesh | None = None,
    *,
    loss_tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
) -> ParityReport:
    """Compare loss and every parameter's gradient of a wrapped model with one device's.

    Collective: every rank of the mesh calls it, with its own batch. The reference's documents are
    dealt to the ranks, each whole, so the longest must fit one device. Parameters, gradients and
    the random state stay as they were. The default tolerances are for float32.

    Args:
        model: wrapped by `parallelize`, before `fully_shard`.
        batch: this rank's.
        mesh: the whole mesh; None: the ranks of the batch's group.

    Returns:
        The report, if it is within tolerance.

    Raises:
        ParityError: it is not; the message names the first module that diverges. Or the ranks do
            not hold the same weights, so that there is no one device to compare with.
        UnsupportedModelError: a model that is not wrapped, is sharded, or draws dropout masks.
        DataError: no token of the batches is a target.
    """
    check_comparable(model)
    groups = [group for group in _groups(batch, mesh) if group is not None]
    check_same_weights(model, groups)
    streams = _all_streams(batch, groups)
    targets = sum(int((stream.labels != IGNORE_INDEX).sum()) for stream in streams)
    if not targets:  # the same on every rank
        raise DataError(
            "no token of the batch is a target: give it a document of two tokens or more"
        )
    reference_model = unparallelize(copy.deepcopy(model))
    random = random_state(model)
    reference_loss, reference_gradients = _reference(reference_model, streams, targets, groups)
    check_drew_nothing(model, random, groups)
    loss, gradients = _wrapped(model, batch, mesh, groups)
    errors = _gradient_errors(gradients, reference_gradients)
    report = ParityReport(loss, reference_loss, errors, loss_tolerance, gradient_tolerance)
    if report.ok:
        return report
    found = first_divergence(
        model, reference_model, batch, gradient_errors=errors, tolerance=gradient_tolerance
    )
    raise ParityError(
        ParityReport(**{**vars(report), "divergence": _agreed(found, groups)}).summary()
    )


# -- the two sides --------------------------------------------------------------------------------


def _wrapped(
    model: nn.Module, batch: Batch, mesh: DeviceMesh | None, groups: Sequence[ProcessGroup]
) -> tuple[float, dict[str, Tensor]]:
    logits, labels = logits_and_labels(model(**batch.inputs), batch.labels)
    batch = replace(batch, labels=labels)
    loss = token_loss(logits, batch, mesh=mesh, grad_reduction="sum")
    return loss.item(), _summed(_gradients(loss, model), model, groups)


def _reference(
    model: nn.Module,
    streams: Sequence[PackedStream],
    targets: int,
    groups: Sequence[ProcessGroup],
) -> tuple[float, dict[str, Tensor]]:
    """Each document whole on one device; the documents are dealt to the ranks."""
    documents = list(itertools.chain.from_iterable(map(documents_of, streams)))
    index, ranks = _place(groups)
    loss, total = torch.zeros((), dtype=torch.float64), dict[str, Tensor | None]()
    for document in documents[index::ranks]:
        logits, labels = logits_and_labels(run_document(model, document), document.labels)
        nll = nn.functional.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        loss += nll.item() / targets
        for name, gradient in _gradients(nll / targets, model).items():
            before = total.get(name)
            total[name] = gradient if before is None or gradient is None else before + gradient
    summed = _summed(total, model, groups)
    for group in groups:
        loss = all_reduce_sum(loss.to(next(model.parameters()).device), group)
    return loss.item(), summed


def _summed(
    gradients: dict[str, Tensor | None], model: nn.Module, groups: Sequence[ProcessGroup]
) -> dict[str, Tensor]:
    """Summed over the mesh; a rank that did not use a parameter takes part all the same."""
    totals = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = gradients.get(name)
            total = torch.zeros_like(parameter) if gradient is None else gradient
            for group in groups:
                total = all_reduce_sum(total, group)
            totals[name] = total
    return totals


def _place(groups: Sequence[ProcessGroup]) -> tuple[int, int]:
    """This rank's number in the mesh, and how many ranks it has."""
    index, ranks = 0, 1
    for group in groups:
        index = index * group.size() + group_rank(group)
        ranks *= group.size()
    return index, ranks


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def _gradient_errors(
    gradients: dict[str, Tensor], references: dict[str, Tensor]
) -> dict[str, float]:
    present = [reference.double() for reference in references.values()]
    count = sum(reference.numel() for reference in present)
    rms = math.sqrt(sum(float(reference.square().sum()) for reference in present) / max(count, 1))
    return {
        name: _relative(
            gradients[name], reference, _SMALL_GRADIENT * rms * math.sqrt(reference.numel())
        )
        for name, reference in references.items()
    }


def _relative(found: Tensor, reference: Tensor, least: float) -> float:
    found, reference = found.double(), reference.double()
    if not bool(torch.isfinite(found).all()):
        return math.inf
    size = max(float(reference.norm()), least)
    difference = float((found - reference).norm())
    return difference / size if size else difference


# -- the batch ------------------------------------------------------------------------------------


def _groups(batch: Batch, mesh: DeviceMesh | None) -> list[ProcessGroup | None]:
    return [batch.group] if mesh is None else [g for g in mesh.get_all_groups() if g.size() > 1]


def _all_streams(batch: Batch, groups: Sequence[ProcessGroup]) -> list[PackedStream]:
    """The streams of every rank of the mesh, each once."""
    streams = [whole_stream(batch)]
    own = None if batch.group is None else set(dist.get_process_group_ranks(batch.group))
    for group in groups:
        if own is not None and set(dist.get_process_group_ranks(group)) == own:
            continue
        streams = list(itertools.chain.from_iterable(all_gather_objects(streams, group)))
    return streams


def _agreed(found: Divergence | None, groups: Sequence[ProcessGroup]) -> Divergence | None:
    """One answer for all ranks: the lowest rank's that has one."""
    for group in groups:
        answers = all_gather_objects(found, group)
        found = next((answer for answer in answers if answer is not None), None)
    return found
