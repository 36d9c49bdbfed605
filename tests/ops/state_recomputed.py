"""Layers that activation checkpointing recomputes, run as they are and repeated from recordings.

For ranks of any group; on CUDA devices calls are recorded. Called by state_on_gpus.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from seqpar import comm
from seqpar.kernels.lightning import lightning_attention
from seqpar.layout import SequenceLayout
from seqpar.ops import state_recorded
from seqpar.ops.state import state_attention
from tests.tolerances import RELATIVE, relative_error

__all__ = ["Recomputed"]


class Recomputed:
    """Layers of one kind of call.

    Args:
        device: the ranks' kind of device.
        sizes: tokens of a rank, heads, and their dim.
        decays: with a fixed decay that reaches every rank, or none.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: str, sizes: tuple[int, int, int], *, decays: bool
    ) -> None:
        self.group, self.device = group, device
        self._rank, self._records = group.rank(), device == "cuda"
        size, (tokens, *self._dims) = group.size(), sizes
        self._layout = SequenceLayout.contiguous((0, tokens * size), size)
        slopes = -torch.exp2(-torch.arange(float(self._dims[0]), device=device) - 11)
        self._log_decay = slopes if decays else None

    def check(self) -> None:
        """Assert what each of the functions below says, bit for bit on every rank."""
        self._like_one_device()
        self._other_way(first_repeated=True)
        self._other_way(first_repeated=False)
        self._two_layers()
        self._through_host_memory()

    # -- what is asserted -----------------------------------------------------------------------

    def _like_one_device(self) -> None:
        """A recomputed layer, as it is and repeated, in float64 on one device."""
        self._forget()
        for turn in range(4):
            streams = self._streams(turn)
            whole = [x.double().requires_grad_() for x in streams[:3]]
            log_decay = None if self._log_decay is None else self._log_decay.double()
            o, _ = lightning_attention(*whole, log_decay=log_decay)
            expected = [o, *torch.autograd.grad(o, whole, streams[3].double())]
            *leaves, do = self._shards(turn)
            found = _gradients(self._recomputed, leaves, do)
            for x, ref in zip(found, expected, strict=True):
                ref = self._layout.shard(ref, self._rank)
                assert relative_error(x, ref) <= RELATIVE[torch.bfloat16], turn
        self._assert_repeated(True)

    def _other_way(self, *, first_repeated: bool) -> None:
        """Two micro-batches forward as they are, and recomputed from a recording; or reversed."""
        expected = [self._as_it_is(turn) for turn in (1, 2)]
        self._forget()
        if first_repeated:
            self._warm_up()
        shards = [self._shards(turn) for turn in (1, 2)]
        outputs = [self._recomputed(*leaves) for *leaves, _ in shards]
        self._assert_repeated(first_repeated)
        if first_repeated:
            self._forget()
        else:
            self._warm_up()
        for (*leaves, do), o, ref in zip(shards, outputs, expected, strict=True):
            _assert_equal([o, *torch.autograd.grad(o, leaves, do)], ref)
        self._assert_repeated(not first_repeated)

    def _two_layers(self) -> None:
        """One layer after another, each recomputed; two micro-batches forward before backward."""

        def two(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q, k, v: run(0.01 * run(q, k, v), k, v)

        batches = range(8)
        expected = [self._as_it_is(turn, two) for turn in batches]
        self._forget()
        for pair in zip(batches[::2], batches[1::2], strict=True):
            shards = [self._shards(turn) for turn in pair]
            outputs = [two(self._recomputed)(*leaves) for *leaves, _ in shards]
            for turn, (*leaves, do), o in zip(pair, shards, outputs, strict=True):
                _assert_equal([o, *torch.autograd.grad(o, leaves, do)], expected[turn])
        self._assert_repeated(True)

    def _through_host_memory(self) -> None:
        """What is saved comes back dense and elsewhere; inputs are parts of one tensor."""
        expected = [self._as_it_is(turn) for turn in range(4)]
        self._forget()
        for turn in range(4):
            *leaves, do = self._shards(turn)
            whole = torch.stack([x.detach() for x in leaves], 2).requires_grad_()
            with save_on_cpu() if turn == 2 else nullcontext():  # one that is repeated
                o = self._layer(*whole.unbind(2))
            (grad,) = torch.autograd.grad(o, whole, do)
            _assert_equal([o, *grad.unbind(2)], expected[turn])
        self._assert_repeated(True)

    # -- layers and their recordings ------------------------------------------------------------

    def _layer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state_attention(
            q,
            k,
            v,
            log_decay=self._log_decay,
            layout=self._layout,
            group=self.group,
            exchange="all_gather",
            check=False,
        )[0]

    def _recomputed(self, *inputs: Tensor) -> Tensor:
        return checkpoint(self._layer, *inputs, use_reentrant=False)  # type: ignore[no-any-return]

    def _as_it_is(
        self, turn: int, model: Callable[..., Callable[..., Tensor]] = lambda run: run
    ) -> list[Tensor]:
        """Nothing recomputed and nothing repeated."""
        self._forget()
        *leaves, do = self._shards(turn)
        return _gradients(model(self._layer), leaves, do)

    def _warm_up(self) -> None:
        for turn in (8, 9):
            *leaves, do = self._shards(turn)
            _gradients(self._layer, leaves, do)

    def _forget(self) -> None:
        state_recorded._CALLS.pop(self.group, None)

    def _assert_repeated(self, expected: bool) -> None:
        calls = [x.call for x in state_recorded._CALLS.get(self.group, {}).values()]
        ready = [call.is_ready for call in calls if call.with_grad]
        assert ready == ([expected] if self._records else []), comm.backend_of(self.group)

    def _streams(self, turn: int) -> list[Tensor]:
        """q, k, v, do of all ranks, the same on each."""
        generator = torch.Generator(self.device).manual_seed(turn)
        shape, options = (1, self._layout.num_tokens, *self._dims), {"device": self.device}
        drawn = [torch.randn(shape, generator=generator, **options) for _ in range(4)]
        return [x.to(torch.bfloat16) for x in drawn]

    def _shards(self, turn: int) -> list[Tensor]:
        """This rank's, alone in their memory: leaves q, k, v, and do."""
        q, k, v, do = (self._layout.shard(x, self._rank).clone() for x in self._streams(turn))
        return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do]


def _gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor], do: Tensor) -> list[Tensor]:
    o = run(*leaves)
    return [o, *torch.autograd.grad(o, leaves, do)]


def _assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, ref in zip(found, expected, strict=True):
        assert torch.isfinite(ref).all()
        assert torch.equal(x, ref)
