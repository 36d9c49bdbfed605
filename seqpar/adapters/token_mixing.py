"""Modules that mix tokens in a way that seqpar does not see: of one rank, whatever the documents.

A model with one of them would train on wrong numbers without a word, so it is refused when it is
wrapped. What cannot be seen from a class is left to `check_parity`: attention in a plain function,
or written out as products.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import CodeType

from torch import nn

from seqpar.errors import UnsupportedModelError

__all__ = ["check_token_mixing"]

_MIXES_TOKENS = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.modules.batchnorm._BatchNorm,
)
_ATTENTION = frozenset(
    {
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flex_attention",
        "memory_efficient_attention",
        "scaled_dot_product_attention",
    }
)


def check_token_mixing(model: nn.Module, *, known: Collection[nn.Module] = (), remedy: str) -> None:
    """Refuse recurrent layers, batch norms, wide convolutions and attention outside seqpar.

    Args:
        known: modules that are replaced as a whole: what is in them is not looked at.
        remedy: what to do instead.

    Raises:
        UnsupportedModelError: the first such module.
    """
    inside = {part for module in known for part in module.modules()}
    for name, module in model.named_modules():
        if module not in inside and _mixes_tokens(module):
            kind = type(module).__name__
            raise UnsupportedModelError(
                f"{name} ({kind})" if name else kind,
                "it mixes tokens of one rank and knows nothing of the others' and of documents",
                remedy,
            )


def _mixes_tokens(module: nn.Module) -> bool:
    wide = isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
    return wide or isinstance(module, _MIXES_TOKENS) or _calls_attention(type(module))


def _calls_attention(kind: type[nn.Module]) -> bool:
    """Whether a method that the class or a base of it defines names an attention function."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    methods = [x for base in bases for x in vars(base).values() if inspect.isfunction(x)]
    unwrapped = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
    codes: list[CodeType] = [code for code in unwrapped if code is not None]
    for code in codes:  # grows by the functions within
        if not _ATTENTION.isdisjoint(code.co_names):
            return True
        codes += [x for x in code.co_consts if isinstance(x, CodeType)]
    return False
