"""What happens to gradients and random numbers over a mesh when nothing else takes care of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from seqpar.comm import all_reduce_sum
from seqpar.errors import MeshError
from seqpar.loss import GradReduction, groups_of

__all__ = ["reduce_gradients", "seed_ranks"]

_BUCKET_ELEMENTS = 1 << 25


def reduce_gradients(
    model: nn.Module, mesh: DeviceMesh, *, grad_reduction: GradReduction = "mean"
) -> None:
    """Sum or average every parameter's gradient over all ranks of the mesh, in place.

    For replicated parameters, after the last micro-batch of a step; `fully_shard` and DDP do this
    themselves. Afterwards `torch.nn.utils.clip_grad_norm_` sees the true global norm.

    Args:
        mesh: the whole mesh, dp and sp.
        grad_reduction: as the loss was computed with; "mean" undoes its factor.

    A parameter that no rank used keeps no gradient; one that some rank used gets one everywhere.
    """
    groups = groups_of(mesh)
    ranks = 1
    for group in groups:
        ranks *= group.size()
    scale = 1 / ranks if grad_reduction == "mean" else 1.0
    for bucket in _buckets(_used(model, groups)):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
        for group in groups:
            flat = all_reduce_sum(flat, group)
        parts = torch.split(flat * scale, [parameter.numel() for parameter in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()


def seed_ranks(seed: int, mesh: DeviceMesh) -> None:
    """Seed torch so that no two ranks of the mesh draw the same dropout masks.

    Call it after the model's weights exist: those must be alike on all ranks. The same seed on
    the same mesh gives the same run again.

    Raises:
        MeshError: a negative seed.
    """
    if seed < 0:
        raise MeshError(f"a seed is a whole number from 0 on, got {seed}")
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh"
    index = 0
    for place, size in zip(coordinate, mesh.shape, strict=True):
        index = index * size + place
    torch.manual_seed((seed << 20) + index)


def _used(model: nn.Module, groups: list[torch.distributed.ProcessGroup]) -> list[nn.Parameter]:
    """Parameters that have a gradient on any rank, in the same order on all."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return []
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    counts = used.to(torch.int64)
    for group in groups:
        counts = all_reduce_sum(counts, group)
    return [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of one dtype, up to 32 Mi elements each."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        fits = buckets and buckets[-1][-1].dtype == parameter.dtype and parameter.numel() <= room
        if not fits:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
