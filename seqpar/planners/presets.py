"""Published constants: FlexSP's GPT-7B, 13B and 30B on 64 A100-40GB (8 nodes of 8).

From the authors' released code (PKU-DAIR/Hetu-Galvatron, branch flexsp; arXiv 2412.01523):
compute in ms, all-to-all bandwidth in 2^30 bytes a second, 16 · layers · hidden bytes a token on
the wire, activations in 2^20 bytes a token, 16 bytes a parameter of states over all devices. A
device's budget is 28 GiB there, which `MEMORY_GIB` gives.
"""

from __future__ import annotations

from seqpar.errors import PlanError
from seqpar.planners.cost import CostModel, Exchange, LayerCost, Link

__all__ = ["MEMORY_GIB", "preset", "preset_names"]

MEMORY_GIB = 28.0
_MIB = 1024**2
_LINKS = ((2, 1, 119.5), (4, 1, 104.1), (8, 1, 96.5), (16, 2, 10.3), (32, 4, 5.9), (64, 8, 4.9))
_MODELS = {
    # ms per token², ms per token, ms, MiB per token, layers, hidden, 1e9 parameters
    "flexsp-7b": (5.128e-6, 0.18396, 629.0, 4.480, 32, 4096, 7),
    "flexsp-13b": (9.285e-6, 0.30602, 1133.0, 4.220, 40, 5120, 13),
    "flexsp-30b": (1.543e-5, 0.80357, 2789.0, 3.417, 60, 6656, 30),
}


def preset_names() -> list[str]:
    """Names that `preset` knows."""
    return sorted(_MODELS)


def preset(name: str) -> CostModel:
    """A published cost model by name.

    Raises:
        PlanError: an unknown name.
    """
    if name not in _MODELS:
        raise PlanError(f"no cost preset {name!r}: choose one of {', '.join(_MODELS)}, or a file")
    quadratic, linear, fixed, mib, layers, hidden, billions = _MODELS[name]
    return CostModel(
        name=name,
        layers=(
            LayerCost(kind="softmax", quadratic_ms=quadratic),
            LayerCost(kind="projection", linear_ms=linear),
        ),
        fixed_ms=fixed,
        exchanges=(Exchange(strategy="ulysses", bytes_per_token=16.0 * layers * hidden),),
        links=tuple(Link(degree=d, nodes=n, gib_per_s=b) for d, n, b in _LINKS),
        memory_bytes_per_token=mib * _MIB,
        memory_sharded_bytes=billions * 16 * 1024 * _MIB,
    )
