"""Wrapping: that layouts never mix, ranks without tokens, and the way back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqpar.adapters.tiny import TINY_VOCABULARY, tiny_model, tiny_stream
from seqpar.batch import Batch, PackedStream, pack, shard
from seqpar.errors import SeqparError
from seqpar.layout import SequenceLayout
from seqpar.loss import count_targets, token_loss
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


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_a_wrapped_model_is_not_pickled(family: str) -> None:
    """It came back with its own forwards, and took the whole stream for one document."""
    model = parallelize(tiny_model(family), None)
    with pytest.raises(SeqparError, match=r"save model.state_dict\(\), or seqpar.unparallelize"):
        pickle.dumps(model)
    assert pickle.dumps(unparallelize(model))


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
