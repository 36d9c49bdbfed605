"""The one call that wraps a model, and the one that gives it back.

`parallelize` changes what a model's forward does and nothing else: parameters, buffers, module
names and `state_dict` keys stay. Two kinds of models are taken:

- models on seqpar's operators: their forward is `(input_ids, position_ids, *, layout, group, ...)`;
- Hugging Face models of the families that docs/models.md lists.

The layout comes with every call (`model(**batch.inputs)`) and is passed down as an argument.
Nothing of it is kept between calls.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from seqpar.adapters.hf_forward import hugging_face_forward
from seqpar.adapters.hf_models import check_supported, hugging_face_model, mixers_of, whole_forward
from seqpar.adapters.token_mixing import check_token_mixing
from seqpar.adapters.wrapping import (
    MARK,
    Bound,
    Wrapping,
    replace_forward,
    restore_forward,
    wrapping_of,
)
from seqpar.batch import group_of
from seqpar.errors import LayoutError, UnsupportedModelError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Strategy
from seqpar.ops.state_exchange import EXCHANGES

__all__ = ["is_parallelized", "parallelize", "takes_strategy", "unparallelize"]

M = TypeVar("M", bound=nn.Module)


_AROUND = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
)
"""Torch's modules around a whole model; by name, for their imports take seconds."""


def parallelize(
    model: M,
    mesh: DeviceMesh | ProcessGroup | None,
    *,
    strategy: Strategy = "auto",
    exchange: str = "auto",
    check: bool = True,
) -> M:
    """Make a model compute on one rank's part of a stream what it would compute on the whole.

    Call it before `fully_shard`, `torch.compile` and DDP; before or after PEFT's adapters.
    Afterwards call `model(**batch.inputs)` with a batch from `seqpar.shard`.

    Args:
        model: changed in place.
        mesh: the ranks that streams are scattered over: `mesh["sp"]`, a group, or None. A batch
            sharded over another group brings its own along.
        strategy: how softmax layers exchange: "auto" or one that `softmax_attention` takes.
        exchange: how state layers exchange: "auto" or one that `state_attention` takes.
        check: once a call, compare the layout over the group and check that each rank's tokens
            and positions fit it (one all_gather of 16 bytes a rank), so that what would hang or
            count from a wrong place is refused.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a module that cannot be made exact: which, why, what would work.
        LayoutError: no such strategy or exchange.
        MeshError: a mesh of more than one axis.
    """
    if is_parallelized(model):
        raise UnsupportedModelError(
            type(model).__name__, "it is wrapped already", "unparallelize it first"
        )
    _check_choice("strategy", strategy, get_args(Strategy))
    _check_choice("exchange", exchange, ("auto", "all_to_all", *EXCHANGES))
    wrapping = Wrapping(group_of(mesh), strategy, exchange, check)
    hugging_face = hugging_face_model(model)
    if hugging_face is not None:
        _wrap_hugging_face(hugging_face, wrapping)
    else:
        _check_own_model(model)
        replace_forward(model, _own_forward)
        setattr(model, MARK, wrapping)
    return model


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LayoutError(f"no {what} {value!r}: one of {', '.join(known)}")


def unparallelize(model: M) -> M:
    """Give the model back as it was, its trained weights kept. Undoes `parallelize` in place."""
    for module in model.modules():
        restore_forward(module)
        attention = module.__dict__.pop("_seqpar_previous_attention", None)
        if attention is not None:
            config: Any = module.config
            config._attn_implementation = attention
        module.__dict__.pop(MARK, None)
    return model


def takes_strategy(model: nn.Module) -> bool:
    """Whether a call may say how softmax layers exchange: `model(**batch.inputs, strategy="ring")`.

    Wrapped Hugging Face models do, and models whose forward names a `strategy`.
    """
    if is_parallelized(model) and hugging_face_model(model):
        return True
    return "strategy" in inspect.signature(model.forward).parameters


def is_parallelized(model: nn.Module) -> bool:
    """Whether `parallelize` has wrapped the model, or the model inside a PEFT model."""
    return any(MARK in module.__dict__ for module in model.modules())


# -- models on seqpar's operators -----------------------------------------------------------------


def _check_own_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if kind in _AROUND:
        raise UnsupportedModelError(
            kind, "it is around the model", f"parallelize the model, then put {kind} around it"
        )
    parameters = inspect.signature(model.forward).parameters
    missing = {"layout", "group"} - set(parameters)
    if missing:
        raise UnsupportedModelError(
            type(model).__name__,
            f"its forward takes no {' and no '.join(sorted(missing))}, so nothing tells its layers "
            "where the tokens are",
            "write it as forward(input_ids, position_ids, *, layout, group) on seqpar's operators, "
            "or use a Hugging Face model that docs/models.md lists",
        )
    _check_call(model)
    check_token_mixing(
        model, remedy="replace it by softmax_attention, state_attention or short_convolution"
    )


def _check_call(model: nn.Module) -> None:
    """Refuse a forward that a batch cannot be given to; `_own_forward` calls it like this."""
    try:
        inspect.signature(model.forward).bind(None, None, layout=None, group=None)
    except TypeError as error:
        raise UnsupportedModelError(
            type(model).__name__,
            f"its forward cannot be called with a batch ({error})",
            "write it as forward(input_ids, position_ids, *, layout, group)",
        ) from None


def _own_forward(
    self: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    group: Any = Bound,
    original: Callable[..., Any],
    **options: Any,
) -> Any:
    sequence = wrapping_of(self).context(
        layout,
        group,
        input_ids,
        positions=position_ids,
        problem=_own_refusal(self, position_ids, options),
    )
    return original(
        input_ids, position_ids, layout=sequence.layout, group=sequence.group, **options
    )


def _own_refusal(
    model: nn.Module, position_ids: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Why this call of a model of one's own cannot be answered; None if it can."""
    if position_ids is None:
        return "a model of your own takes input_ids and position_ids: call model(**batch.inputs)"
    if options.get("head_labels") is None:
        return None
    if "head_labels" not in inspect.signature(model.forward).parameters:
        return (
            "chunked_token_loss knows the heads of Hugging Face's causal models: in a model of "
            "your own call lm_head_loss_sum(hidden, weight, labels), then mean_over_mesh"
        )
    return None


# -- Hugging Face models --------------------------------------------------------------------------


def _wrap_hugging_face(model: nn.Module, wrapping: Wrapping) -> None:
    from seqpar.adapters.hf_attention import ATTENTION_NAME, install

    check_supported(model)
    install()
    _own_config(model)
    config: Any = model.config
    model.__dict__["_seqpar_previous_attention"] = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    for module, forward in mixers_of(model):
        replace_forward(module, forward)
    whole = whole_forward(model)
    replace_forward(model, functools.partial(hugging_face_forward, whole=whole))
    setattr(model, MARK, wrapping)


def _own_config(model: nn.Module) -> None:
    """Give the model configs of its own: another model may share them and is not wrapped."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:
            module.__dict__["config"] = copy.deepcopy(config, memo)
