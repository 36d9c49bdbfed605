"""Wrapping: what is refused and how it says so, that layouts never mix, and the way back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seqpar.adapters.hf_attention import ATTENTION_NAME, hf_attention
from seqpar.adapters.sequence import SequenceContext
from seqpar.adapters.tiny import TINY_VOCABULARY, tiny_model, tiny_stream
from seqpar.batch import Batch, PackedStream, pack, shard
from seqpar.errors import LayoutError, MeshError, UnsupportedModelError
from seqpar.layout import SequenceLayout
from seqpar.loss import chunked_token_loss, count_targets, token_loss
from seqpar.parity import check_parity
from seqpar.wrap import is_parallelized, parallelize, unparallelize
from tests.ranks import run_ranks
from tests.recompute import recompute_layers
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


# -- layouts never mix ----------------------------------------------------------------------------


INTERLEAVED = ("llama", "minimax", "bamba")
"""Softmax; lightning; Mamba-2, which has a convolution besides."""


def _interleaved(rank: int) -> dict[str, dict[str, Tensor]]:
    """Two forwards before two backwards, layers recomputed in backward, layouts unlike."""
    models = {family: tiny_model(family) for family in INTERLEAVED}
    for model in models.values():
        recompute_layers(model)
    models["own"] = small_hybrid(checkpointed=True)
    batches = [
        shard(_stream(21, 4, seed=1), dist.group.WORLD, layout="contiguous"),
        shard(_stream(2, 30, 5, seed=2), dist.group.WORLD, layout="zigzag"),
    ]
    targets = count_targets(batches)
    found = {}
    for name, model in models.items():
        parallelize(model.train(), dist.group.WORLD)
        losses = [
            token_loss(_logits(model(**b.inputs)), b, num_targets=targets, grad_reduction="sum")
            for b in batches
        ]
        for loss in losses:
            loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        found[name] = {n: p.grad for n, p in model.named_parameters()}
    return found


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _reference_gradients(model: nn.Module, *, own: bool) -> dict[str, Tensor]:
    """Document by document on one device."""
    documents = []
    for stream in (_stream(21, 4, seed=1), _stream(2, 30, 5, seed=2)):
        documents += list(stream.ids[0].split(torch.tensor(stream.cu_seqlens).diff().tolist()))
    targets = sum(len(document) - 1 for document in documents)
    for document in documents:
        layout = SequenceLayout.contiguous((0, len(document)), 1)
        place = {"layout": layout, "group": None} if own else {}
        logits = _logits(model(document[None], position_ids=layout.position_ids(0)[None], **place))
        nll = nn.functional.cross_entropy(logits[0, :-1], document[1:], reduction="sum")
        (nll / targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_two_forwards_before_two_backwards_use_each_their_own_layout() -> None:
    results = run_ranks(3, _interleaved)
    for name in (*INTERLEAVED, "own"):
        model = small_hybrid() if name == "own" else tiny_model(name)
        expected = _reference_gradients(model, own=name == "own")
        for result in results:
            assert result[name].keys() == expected.keys()
            for parameter, gradient in expected.items():
                if gradient.norm() > 1e-3:
                    error = relative_error(result[name][parameter], gradient)
                    assert error < MODEL_GRADIENT, (name, parameter)


def _positions_left_out(rank: int) -> tuple[Tensor, Tensor]:
    model = parallelize(tiny_model("llama"), dist.group.WORLD)
    inputs = shard(_stream(21, 4), dist.group.WORLD, layout="zigzag").inputs
    given = model(**inputs).logits
    return given, model(**{**inputs, "position_ids": None}).logits


def test_positions_are_the_layout_s_own_where_none_are_given() -> None:
    for given, left_out in run_ranks(2, _positions_left_out):
        assert torch.equal(given, left_out)


# -- fewer tokens than ranks ----------------------------------------------------------------------


def _few_tokens(rank: int) -> list[int]:
    held = []
    models = [tiny_model(family) for family in ("llama", "minimax", "bert", "t5")]
    for model in (*models, small_hybrid()):
        parallelize(model, dist.group.WORLD)
        batch: Batch = shard(tiny_stream(model, (2,)), dist.group.WORLD)
        held.append(batch.ids.shape[1])
        assert _logits(model(**batch.inputs)).shape == (1, held[-1], TINY_VOCABULARY)
        check_parity(model, batch)
    return held


def test_a_rank_may_hold_nothing() -> None:
    assert run_ranks(3, _few_tokens) == [[0] * 5, [1] * 5, [1] * 5]


# -- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "minimax", "bamba", "mamba2"])
def test_unparallelize_gives_the_model_back(family: str) -> None:
    model, untouched = tiny_model(family), tiny_model(family)
    ids = _stream(12).ids
    keys, before = list(model.state_dict()), model(ids).logits
    parallelize(model, None)
    assert is_parallelized(model)
    assert list(model.state_dict()) == keys
    wrapped = model(**shard(_stream(12), None).inputs).logits
    assert relative_error(wrapped, before) < 1e-5

    unparallelize(model)
    assert not is_parallelized(model)
    assert torch.equal(model(ids).logits, before)
    untouched.load_state_dict(model.state_dict())
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, untouched.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_wrapped_model_is_saved_as_the_unwrapped_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = parallelize(tiny_model("minimax"), None)
    wrapped = model(**shard(_stream(12), None).inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_parallelized(loaded)
    assert relative_error(loaded(_stream(12).ids).logits, wrapped) < 1e-5


def test_another_model_of_the_same_config_stays_as_it_was() -> None:
    from transformers import LlamaForCausalLM

    wrapped = tiny_model("llama")
    other = LlamaForCausalLM(wrapped.config)
    ids = _stream(12).ids
    before = other(ids).logits
    parallelize(wrapped, None)
    assert torch.equal(other(ids).logits, before)


def test_a_copy_of_a_wrapped_model_is_wrapped_by_itself() -> None:
    model = parallelize(tiny_model("llama"), None)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    inputs = shard(_stream(12), None).inputs
    assert model(**inputs).logits.abs().max() > 0
    assert other(**inputs).logits.abs().max() == 0
    unparallelize(other)
    assert is_parallelized(model)
