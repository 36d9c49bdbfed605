"""What wrapping refuses, when a model is wrapped and when it is called, and how it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seqpar.adapters.hf_attention import ATTENTION_NAME, hf_attention
from seqpar.adapters.sequence import SequenceContext
from seqpar.adapters.tiny import TINY_VOCABULARY, tiny_model
from seqpar.batch import PackedStream, pack, shard
from seqpar.errors import LayoutError, MeshError, UnsupportedModelError
from seqpar.layout import SequenceLayout
from seqpar.loss import chunked_token_loss
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
from tests.small_hybrid import small_hybrid
from tests.tolerances import MODEL_GRADIENT, relative_error

pytest.importorskip("transformers")


def _stream(*lengths: int, seed: int = 0) -> PackedStream:
    generator = torch.Generator().manual_seed(seed)
    return pack([torch.randint(3, TINY_VOCABULARY, (n,), generator=generator) for n in lengths])


# -- refusals at wrap time ------------------------------------------------------------------------


def _hugging_face(family: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0}
        config = AutoConfig.for_model(family, **{**small, **heads, **options})
        return AutoModelForCausalLM.from_config(config)

    return build


def _bert_with_pooler() -> nn.Module:
    from transformers import BertModel

    return BertModel(tiny_model("bert").config)


def _classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(tiny_model("llama").config)


class _With(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, ids: Tensor, positions: Tensor, *, layout: Any, group: Any) -> Tensor:
        return self.mixer(ids)[0]


class _TorchAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        attend = lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True)  # noqa: E731
        return attend(x)


class _InheritedAttention(_TorchAttention):
    pass


class _OwnAttention(nn.Module):
    @torch.no_grad()
    def forward(self, ids: Tensor, positions: Tensor, *, layout: Any, group: Any) -> Tensor:
        return F.scaled_dot_product_attention(ids, ids, ids)


def _llama_with(part: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny_model("llama")
        model.model.layers[1].mlp = part(model.model.layers[1].mlp)
        return model

    return build


def _changed_mixer() -> nn.Module:
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    class Changed(MiniMaxLightningAttention):
        def forward(self, hidden_states: Tensor, **inputs: Any) -> Any:
            return super().forward(2 * hidden_states, **inputs)

    model = tiny_model("minimax")
    model.model.layers[0].self_attn.__class__ = Changed
    return model


def _with_rope(rope_type: str) -> Callable[[], nn.Module]:
    factors = (
        {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    )
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4, **factors}
    return lambda: tiny_model("llama", rope_parameters=rope)


@pytest.mark.parametrize(
    ("build", "module", "reason"),
    [
        (
            lambda: tiny_model("gemma2", attn_logit_softcapping=50.0),
            "attn_logit_softcapping",
            "cap",
        ),
        (
            lambda: tiny_model("llama", attention_dropout=0.1),
            "attention_dropout = 0.1",
            "every degree",
        ),
        (lambda: tiny_model("minimax", output_router_logits=True), "router_logits", "two means"),
        (_with_rope("dynamic"), "rope_type 'dynamic'", "longest position"),
        (_with_rope("longrope"), "rope_type 'longrope'", "longest position"),
        (_hugging_face("mamba", state_size=4), "layers.0.mixer", "Mamba-1"),
        (_hugging_face("stablelm"), "StableLmForCausalLM", "'stablelm' to be exact"),
        (_bert_with_pooler, "pooler", "first token"),
        (lambda: tiny_model("t5", dropout_rate=0.1), "dropout_rate", "every degree"),
        (_classifier, "LlamaForSequenceClassification", "one place of each row"),
        (
            lambda: tiny_model("gemma3_text", use_bidirectional_attention=True),
            "use_bidirectional_attention",
            "both directions",
        ),
        (
            lambda: tiny_model("bert", is_decoder=True, add_cross_attention=True),
            "add_cross_attention",
            "a stream whose layout",
        ),
        (_llama_with(lambda mlp: nn.GRU(32, 32)), "layers.1.mlp (GRU)", "mixes tokens"),
        (_llama_with(lambda mlp: _TorchAttention()), "mlp (_TorchAttention)", "mixes tokens"),
        (
            _llama_with(lambda mlp: nn.Sequential(mlp, nn.Conv1d(32, 32, 3))),
            "layers.1.mlp.1 (Conv1d)",
            "mixes tokens",
        ),
        (_changed_mixer, "layers.0.self_attn (Changed)", "forward of MiniMaxLightningAttention"),
        (
            lambda: torch.compile(tiny_model("llama"), backend="eager"),
            "OptimizedModule",
            "around the model",
        ),
        (lambda: nn.DataParallel(tiny_model("llama")), "DataParallel", "around the model"),
        (lambda: nn.Linear(3, 3), "Linear", "no group and no layout"),
        (lambda: _With(nn.GRU(4, 4)), "mixer (GRU)", "mixes tokens"),
        (lambda: _With(nn.LSTM(4, 4)), "mixer (LSTM)", "mixes tokens"),
        (lambda: _With(nn.BatchNorm1d(4)), "mixer (BatchNorm1d)", "mixes tokens"),
        (lambda: _With(nn.Conv1d(4, 4, 3)), "mixer (Conv1d)", "mixes tokens"),
        (lambda: _With(nn.MultiheadAttention(4, 2)), "mixer (MultiheadAttention)", "mixes tokens"),
        (lambda: _With(_TorchAttention()), "mixer (_TorchAttention)", "mixes tokens"),
        (_OwnAttention, "_OwnAttention", "mixes tokens"),
        (lambda: _With(_InheritedAttention()), "mixer (_InheritedAttention)", "mixes tokens"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    build: Callable[[], nn.Module], module: str, reason: str
) -> None:
    model = build()
    before = dict(model.__dict__)
    with pytest.raises(UnsupportedModelError) as caught:
        parallelize(model, None)
    assert module in caught.value.module
    assert reason in caught.value.reason
    assert caught.value.remedy
    assert model.__dict__ == before  # a refused model is left as it was


def test_wrapping_twice_or_over_two_axes_is_refused() -> None:
    model = parallelize(small_hybrid(), None)
    with pytest.raises(UnsupportedModelError, match="wrapped already"):
        parallelize(model, None)


class _OneDocument(nn.Module):
    def forward(self, ids: Tensor, layout: Any, group: Any) -> Tensor:
        return ids


def test_a_forward_that_no_batch_can_be_given_to_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be called with a batch"):
        parallelize(_OneDocument(), None)


# -- refusals at call time ------------------------------------------------------------------------


def test_a_model_of_one_s_own_is_told_what_its_calls_lack() -> None:
    model = parallelize(small_hybrid(), None)
    batch = shard(_stream(12), None)
    with pytest.raises(LayoutError, match="takes input_ids and position_ids"):
        model(batch.ids, layout=batch.layout)
    with pytest.raises(LayoutError, match="call lm_head_loss_sum"):
        chunked_token_loss(model, batch)


def test_positions_of_one_s_own_pass_where_checks_are_off() -> None:
    model, batch = tiny_model("llama"), shard(_stream(12), None)
    positions = 3 * batch.position_ids
    expected = model(input_ids=batch.ids, position_ids=positions).logits
    parallelize(model, None, check=False)
    own = model(**{**batch.inputs, "position_ids": positions}).logits
    assert relative_error(own, expected) < MODEL_GRADIENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": None}, "needs the layout"),
        ({"attention_mask": torch.ones(1, 12)}, "attention_mask: turn padding"),
        ({"labels": torch.zeros(1, 12, dtype=torch.int64)}, "token_loss"),
        ({"use_cache": True}, "unparallelize"),
        ({"past_key_values": object()}, "past_key_values: caches are for generation"),
        ({"logits_to_keep": 1}, "logits_to_keep: take the logits"),
        ({"output_attentions": True}, "output_attentions: attention weights exist on no rank"),
        ({"input_ids": torch.zeros(1, 5, dtype=torch.int64)}, "has 5 tokens but the layout"),
        ({"input_ids": torch.zeros(2, 12, dtype=torch.int64)}, "one packed stream"),
        ({"layout": SequenceLayout.contiguous((0, 12), 2)}, "2 ranks but the group has 1"),
        ({"position_ids": torch.arange(1, 13)[None]}, "position_ids are not the layout's"),
        ({"position_ids": torch.arange(13)[None]}, "position_ids are not the layout's"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    model = parallelize(tiny_model("llama"), None)
    inputs = shard(_stream(12), None).inputs
    with pytest.raises(LayoutError, match=message):
        model(**{**inputs, **change})


def _call_of_attention(**options: Any) -> Callable[[], object]:
    """A layer's call as transformers makes it, with what a model of its own kind might add."""
    x = torch.randn(1, 2, 12, 8)
    place = {"sequence": SequenceContext(SequenceLayout.contiguous((0, 12), 1), None)}
    inputs = {"attention_mask": None, **place, **options}
    return lambda: hf_attention(nn.Identity(), x, x, x, **inputs)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_call_of_attention(attention_mask=torch.ones(1, 1, 12, 12)), "an attention mask of shape"),
        (_call_of_attention(dropout=0.1), "dropout 0.1 on the attention weights"),
        (_call_of_attention(softcap=30.0), "it takes 'softcap'"),
        (_call_of_attention(s_aux=torch.zeros(2)), "it takes 's_aux'"),
        (lambda: _mask_of_attention(use_vmap=True), "a mask function of its own"),
    ],
)
def test_what_a_layer_s_attention_cannot_express_is_refused(
    call: Callable[[], object], reason: str
) -> None:
    """Layers change after they are wrapped; transformers would drop what a function ignores."""
    with pytest.raises(UnsupportedModelError) as caught:
        call()
    assert reason in caught.value.reason


def _mask_of_attention(**described: Any) -> object:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    parallelize(tiny_model("llama"), None)  # which registers it
    return ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_NAME](config=None, **described)


def test_attention_without_a_layout_and_masks_of_padding_are_refused() -> None:
    with pytest.raises(LayoutError, match="needs the layout of its batch"):
        _call_of_attention(sequence=None)()
    with pytest.raises(LayoutError, match="turn padding into documents"):
        _mask_of_attention(attention_mask=torch.ones(1, 12))


def _one_rank_does_not_fit(rank: int) -> str:
    model = parallelize(tiny_model("llama"), dist.group.WORLD)
    batch = shard(_stream(20, 3), dist.group.WORLD)
    if rank == 1:
        batch = dataclasses.replace(batch, ids=batch.ids[:, :-1])
    with pytest.raises(LayoutError) as caught:
        model(**batch.inputs)
    good = shard(_stream(20, 3), dist.group.WORLD).inputs
    wrong = {"layout": None} if rank == 0 else {}
    with pytest.raises(LayoutError, match="needs the layout of its batch"):
        model(**{**good, **wrong})
    masked = {"attention_mask": torch.ones(1, 11)} if rank == 0 else {}
    with pytest.raises(LayoutError, match="attention_mask: turn padding"):
        model(**{**good, **masked})
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "sp"))
    with pytest.raises(MeshError, match="one mesh axis"):
        parallelize(small_hybrid(), mesh)
    return str(caught.value)


def test_one_rank_that_does_not_fit_stops_all_of_them() -> None:
    good, bad = run_ranks(2, _one_rank_does_not_fit)
    assert "this rank has 11 tokens but the layout gives it 12" in bad
    assert "rank 1" in good
    assert "11 tokens" in good
