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
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, get_args

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from seqpar.adapters.hf_head import head_loss_sum
from seqpar.adapters.hf_models import check_supported, hugging_face_model, mixers_of, whole_forward
from seqpar.adapters.sequence import SequenceContext, outside_graph
from seqpar.batch import group_of
from seqpar.comm import agree, group_size
from seqpar.errors import LayoutError, UnsupportedModelError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Strategy
from seqpar.ops.state_exchange import EXCHANGES

__all__ = ["is_parallelized", "parallelize", "unparallelize"]

M = TypeVar("M", bound=nn.Module)
_MARK = "_seqpar_wrapping"


class _Bound:
    """Stands for what was bound at wrap time (a class: copies of a model share it)."""


_MIXES_TOKENS = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.modules.batchnorm._BatchNorm,
)


@dataclass(frozen=True, eq=False)
class _Wrapping:
    """What a wrapped model was given at wrap time; the same value for its copies."""

    group: ProcessGroup | None
    strategy: Strategy
    exchange: str
    check: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wrapping:
        return self

    @outside_graph
    def context(
        self,
        layout: SequenceLayout | None,
        group: Any,
        tokens: Tensor | None,
        *,
        source_layout: SequenceLayout | None = None,
        source_tokens: Tensor | None = None,
    ) -> SequenceContext:
        """The call's context; refused on all ranks alike if one rank's tokens do not fit."""
        if layout is None:
            raise LayoutError(
                "a wrapped model needs the layout of its batch: call model(**batch.inputs) with a "
                "batch from seqpar.shard"
            )
        group = self.group if group is _Bound else group
        sequence = SequenceContext(layout, group, self.strategy, self.exchange, source_layout)
        problem = _misfit(layout, sequence, tokens)
        if source_layout is not None:
            problem = problem or _misfit(source_layout, sequence, source_tokens)
            sources, targets = source_layout.num_documents, layout.num_documents
            if sources != targets:
                problem = problem or f"{sources} sources but {targets} targets: use pack_pairs"
        if group is not None and self.check:
            agree(problem, group, same=(layout, source_layout))
        elif problem is not None:
            raise LayoutError(problem)
        return sequence


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
            fit it (one all_gather of 16 bytes a rank), so that what would hang is refused.

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
    wrapping = _Wrapping(group_of(mesh), strategy, exchange, check)
    hugging_face = hugging_face_model(model)
    if hugging_face is not None:
        _wrap_hugging_face(hugging_face, wrapping)
    else:
        _check_own_model(model)
        _replace_forward(model, _own_forward)
        setattr(model, _MARK, wrapping)
    return model


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LayoutError(f"no {what} {value!r}: one of {', '.join(known)}")


def unparallelize(model: M) -> M:
    """Give the model back as it was, its trained weights kept. Undoes `parallelize` in place."""
    for module in model.modules():
        previous = module.__dict__.pop("_seqpar_previous_forward", None)
        if previous is not None:
            module.__dict__.pop("forward")
            if previous is not _Bound:
                module.__dict__["forward"] = previous
        attention = module.__dict__.pop("_seqpar_previous_attention", None)
        if attention is not None:
            config: Any = module.config
            config._attn_implementation = attention
        module.__dict__.pop(_MARK, None)
    return model


def is_parallelized(model: nn.Module) -> bool:
    """Whether `parallelize` has wrapped the model, or the model inside a PEFT model."""
    return any(_MARK in module.__dict__ for module in model.modules())


# -- models on seqpar's operators -----------------------------------------------------------------


def _check_own_model(model: nn.Module) -> None:
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
    for name, module in model.named_modules():
        wide = isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
        if wide or isinstance(module, _MIXES_TOKENS):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__})",
                "it mixes tokens of one rank and knows nothing of the others' and of documents",
                "replace it by softmax_attention, state_attention or short_convolution",
            )


def _own_forward(
    self: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    layout: SequenceLayout | None = None,
    group: Any = _Bound,
    original: Callable[..., Any],
    **options: Any,
) -> Any:
    sequence = getattr(self, _MARK).context(layout, group, input_ids)
    return original(
        input_ids, position_ids, layout=sequence.layout, group=sequence.group, **options
    )


# -- Hugging Face models --------------------------------------------------------------------------


def _wrap_hugging_face(model: nn.Module, wrapping: _Wrapping) -> None:
    from seqpar.adapters.hf_attention import ATTENTION_NAME, install

    check_supported(model)
    install()
    _own_config(model)
    config: Any = model.config
    model.__dict__["_seqpar_previous_attention"] = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    for module, forward in mixers_of(model):
        _replace_forward(module, forward)
    whole = whole_forward(model)
    _replace_forward(model, functools.partial(_hugging_face_forward, whole=whole))
    setattr(model, _MARK, wrapping)


def _own_config(model: nn.Module) -> None:
    """Give the model configs of its own: another model may share them and is not wrapped."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:
            module.__dict__["config"] = copy.deepcopy(config, memo)


def _hugging_face_forward(
    self: nn.Module,
    *args: Any,
    layout: SequenceLayout | None = None,
    group: Any = _Bound,
    source_layout: SequenceLayout | None = None,
    head_labels: Tensor | None = None,
    original: Callable[..., Any],
    whole: Callable[..., Any] | None,
    **inputs: Any,
) -> Any:
    if whole is not None:
        original = functools.partial(whole, self)
    if head_labels is not None:
        original = functools.partial(head_loss_sum, self, head_labels)
    inputs = _named_inputs(args, inputs)
    tokens, source_tokens = _first(inputs, "input_ids", "inputs_embeds"), None
    if self.config.is_encoder_decoder:  # type: ignore[union-attr]
        source_tokens = tokens
        tokens = _first(inputs, "decoder_input_ids", "decoder_inputs_embeds")
    sequence = getattr(self, _MARK).context(
        layout, group, tokens, source_layout=source_layout, source_tokens=source_tokens
    )
    if source_layout is None and inputs.get("position_ids") is None:
        assert tokens is not None  # or the context would have refused
        positions = sequence.layout.position_ids(sequence.rank)
        inputs["position_ids"] = positions[None].to(tokens.device)
    output = original(**_padded(inputs), sequence=sequence)
    return output if sequence.num_tokens else _cut_tokens(output)


def _first(inputs: dict[str, Any], *names: str) -> Tensor | None:
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


_REFUSED_INPUTS = {
    "attention_mask": "turn padding into documents with pack(), the layout is the mask",
    "labels": "compute the loss with seqpar.token_loss(output.logits, batch, mesh=mesh)",
    "past_key_values": "caches are for generation: unparallelize the model first",
    "cache_params": "caches are for generation: unparallelize the model first",
    "use_cache": "caches are for generation: unparallelize the model first",
    "logits_to_keep": "take the logits of the tokens wanted from the output",
    "output_attentions": "attention weights exist on no rank",
}


def _named_inputs(args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > 1:
        raise LayoutError("pass a wrapped model's inputs by name: model(**batch.inputs)")
    if args:
        inputs = {"input_ids": args[0], **inputs}
    for name, remedy in _REFUSED_INPUTS.items():
        value = inputs.get(name)
        if value is not None and (isinstance(value, Tensor) or value):
            raise LayoutError(f"a wrapped model takes no {name}: {remedy}")
    return {**inputs, "use_cache": False}


def _padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """One token in place of none: reshapes in models cannot infer a size from nothing."""
    return {
        name: value.new_zeros(1, 1, *value.shape[2:])
        if isinstance(value, Tensor) and value.shape[:2] == (1, 0)
        else value
        for name, value in inputs.items()
    }


def _cut_tokens(output: Any) -> Any:
    """Take that one token out of the output again."""
    if isinstance(output, Tensor):
        return output[:, :0] if output.ndim >= 3 and output.shape[:2] == (1, 1) else output
    if isinstance(output, dict):
        for name in list(output):
            output[name] = _cut_tokens(output[name])
        return output
    return tuple(map(_cut_tokens, output)) if isinstance(output, tuple) else output


# -- both -----------------------------------------------------------------------------------------


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


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Set an instance's forward; copies of the module get one bound to themselves."""
    previous = module.__dict__.get("forward", _Bound)

    @functools.wraps(module.forward)
    def replaced(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        before = self.__dict__["_seqpar_previous_forward"]
        own = functools.partial(type(self).forward, self)
        original = own if before is _Bound else before
        return forward(self, *args, original=original, **inputs)

    module.__dict__["_seqpar_previous_forward"] = previous
    module.__dict__["forward"] = MethodType(replaced, module)
