"""CUDA backends against float64: each kernel, rectangles, empty rows, GQA, windows, merged lse."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from seqpar.errors import KernelInputError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_dense import DenseBackend, cut
from seqpar.ops.softmax_kernels import Cudnn, Efficient
from seqpar.ops.softmax_local import Backend, Gradients, attend, attend_backward, choose_backend
from seqpar.ops.softmax_merge import merge_lse_, merge_lse_torch_
from seqpar.ops.softmax_operands import Operands
from seqpar.ops.softmax_packed import FlashPacked
from seqpar.ops.softmax_partial import PartialOutput
from seqpar.ops.softmax_split import SplitBackend
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles
from tests.ops.softmax_reference import reference
from tests.ops.test_softmax_local import TILES, conforms, sees
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

HEADS = {1: (4, 2, 128, 128), 2: (3, 1, 40, 24)}  # by batch
BACKENDS = {
    "cudnn": (DenseBackend(Cudnn()), torch.bfloat16),
    "cudnn fp16": (DenseBackend(Cudnn()), torch.float16),
    "flash": (FlashPacked(), torch.bfloat16),
    "flash fp16": (FlashPacked(), torch.float16),
    "efficient": (DenseBackend(Efficient()), torch.bfloat16),
    "efficient fp16": (DenseBackend(Efficient()), torch.float16),
    "efficient fp32": (DenseBackend(Efficient()), torch.float32),
}


@pytest.fixture(autouse=True)
def _torch_as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic mode with warn_only makes torch's kernels warn, and a warning is an error."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    return


def scaled(tiles: list[Tile], factor: int) -> list[Tile]:
    """The same tiles, `factor` times as large."""
    return [
        Tile(
            *(edge * factor for edge in tile[:4]),
            None if tile.left is None else tile.left * factor,
            None if tile.right is None else tile.right * factor,
        )
        for tile in tiles
    ]


@pytest.mark.parametrize("batch", HEADS)
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_conforms(backend: str, name: str, batch: int) -> None:
    chosen, dtype = BACKENDS[backend]
    factor = 13  # no multiple of a kernel's block
    tiles = scaled(TILES[name], factor)
    if backend.startswith("cudnn") and any(
        not (piece.is_full or piece.is_causal) for tile in tiles for piece in cut(tile)
    ):
        pytest.skip("cuDNN through torch has no windows")
    conforms(
        tiles, HEADS[batch], dtype, "cuda", num_tokens=40 * factor, batch=batch, backend=chosen
    )


def test_choice() -> None:
    def choose(dtype: torch.dtype, dim: int = 128) -> str:
        x = torch.empty(1, 8, 2, dim, dtype=dtype, device="cuda")
        return choose_backend(x, x).name

    on_hopper = torch.cuda.get_device_capability() >= (9, 0)
    for dtype in (torch.bfloat16, torch.float16):
        assert choose(dtype) == ("cudnn+flash" if on_hopper else "flash")
    assert choose(torch.bfloat16, 192) == "flash"
    assert choose(torch.float32) == choose(torch.bfloat16, 320) == "efficient"
    with pytest.raises(KernelInputError, match="float64"):
        choose(torch.float64)
    torch.use_deterministic_algorithms(True)
    assert choose(torch.bfloat16) == "flash"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_large_and_small_tiles_together(batch: int, dtype: torch.dtype) -> None:
    """Documents on both kernels, one of them cut; a rectangle whose rest meets the same rows."""
    split = SplitBackend(DenseBackend(Cudnn()), FlashPacked(), least_work=0)
    documents = [(0, 100), (100, 2300), (2300, 2500)]
    causal = [Tile(a, b, a, b, None, 0) for a, b in documents]
    for tiles in (causal, [Tile(0, 2400, 0, 2100), Tile(2400, 2500, 2100, 2500)]):
        conforms(
            tiles, (2, 1, 64, 64), dtype, "cuda", num_tokens=2500, batch=batch, backend=split,
        )  # fmt: skip


def _gradients(backend: Backend | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 2048, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    return _results(backend, q, k, v, dout, [Tile(0, 2048, 0, 2048, None, 0)], 0.1)


def _results(
    backend: Backend | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    tiles: list[Tile],
    scale: float,
) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    merged = PartialOutput(q, v.shape[-1])
    attend(merged, q, k, v, tiles, scale=scale, backend=backend)
    out, lse = merged.result()
    grads = Gradients.of(q, k, v)
    operands = Operands(dout, q, k, v, out, lse)
    attend_backward(grads, operands, tiles, scale=scale, backend=backend)
    return [out, grads.dq.result(), grads.dk.result(), grads.dv.result()]


def _timed_ms(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.monotonic()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.monotonic() - started)


def test_cudnn_plans_a_tile_once_for_streams_of_any_length() -> None:
    """A plan takes 80 ms; the same tile cut out of longer and longer tensors needs no new one."""

    def attend_first_rows(num_tokens: int) -> float:
        q, k, v = (
            torch.randn(1, num_tokens, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        rows = [x[:, :1536] for x in (q, k, v)]
        return _timed_ms(lambda: Cudnn().forward(*rows, causal=True, bias=None, scale=0.1))

    first = attend_first_rows(2048)
    again = [attend_first_rows(2048 + 64 * i) for i in range(1, 4)]
    assert max(again) < first / 3, (first, again)


def test_cudnn_takes_gradients_of_any_strides() -> None:
    """One plan, then an out gradient that lies in memory head by head."""
    q, k, v, dout = (
        torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    tiles = [Tile(0, 512, 0, 512, None, 0)]
    expected = reference(*(x.cpu() for x in (q, k, v, dout)), sees(tiles, 512, 512), 0.125)
    by_head = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for gradient in (dout, by_head):
        got = _results(DenseBackend(Cudnn()), q, k, v, gradient, tiles, 0.125)
        for what, x, ref in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            assert_close(x, ref, what=what)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient fp32"])
def test_heads_a_few_at_a_time(name: str) -> None:
    """Parts of the heads, cut out of the same tensors and not copied, give the gradients of all."""
    backend, dtype = BACKENDS[name]
    q, dout = (torch.randn(1, 2048, 8, 64, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, 2048, 4, 64, device="cuda", dtype=dtype) for _ in range(2))
    tiles = [Tile(0, 2048, 0, 2048, None, 0)]
    out, *expected = _results(backend, q, k, v, dout, tiles, 0.125)
    merged = PartialOutput(q, 64)
    attend(merged, q, k, v, tiles, scale=0.125, backend=backend)
    operands, grads = Operands(dout, q, k, v, out, merged.result()[1]), Gradients.of(q, k, v)
    for start, stop in ((0, 3), (3, 4)):
        attend_backward(
            grads, operands.of_heads(start, stop), tiles, scale=0.125, backend=backend,
            first_head=start,
        )  # fmt: skip
    found = [grads.dq.result(), grads.dk.result(), grads.dv.result()]
    for what, x, ref in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_close(x, ref, what=what)


def test_deterministic_mode_repeats_every_bit() -> None:
    torch.use_deterministic_algorithms(True)
    first = _gradients(None)
    for _ in range(3):
        for x, again in zip(first, _gradients(None), strict=True):
            assert torch.equal(x, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_kernel_equals_torch(dtype: torch.dtype) -> None:
    out, new_out = (torch.randn(2, 37, 6, 48, device="cuda") for _ in range(2))
    lse, new_lse = (4 * torch.randn(2, 6, 37, device="cuda").transpose(1, 2) for _ in range(2))
    lse[0, 3], new_lse[0, 3:5], new_lse[1, 0, 2] = -torch.inf, -torch.inf, -torch.inf
    out[0, 3], new_out[0, 3:5], new_out[1, 0, 2] = 0, 0, 0
    out = out.to(dtype)
    expected_out, expected_lse = out.float(), lse.clone()
    merge_lse_torch_(expected_out, expected_lse, new_out, new_lse)
    merge_lse_(out, lse, new_out, new_lse)
    assert_close(out, expected_out, what="out")
    assert torch.equal(torch.isneginf(lse), torch.isneginf(expected_lse))
    assert_close(lse.exp(), expected_lse.exp(), what="exp(lse)")


@pytest.mark.parametrize("value_dim", [48, 128])
def test_every_row_of_many_is_merged_with_its_own_weights(value_dim: int) -> None:
    shape = (1, 8192, 32, value_dim)
    first, second = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    lse, new_lse = (4 * torch.randn(shape[:3], device="cuda") for _ in range(2))
    expected, expected_lse = first.float(), lse.clone()
    merge_lse_torch_(expected, expected_lse, second, new_lse)
    for _ in range(40):
        out, merged = first.clone(), lse.clone()
        merge_lse_(out, merged, second, new_lse)
        assert ((out.float() - expected).abs() <= 2**-7 * expected.abs() + 1e-6).all()
        assert torch.allclose(merged, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_merge_is_compiled_once_for_all_lengths() -> None:
    """Of packed rows and of a dense kernel's, which lie head by head, from any row on."""
    from seqpar.ops.softmax_merge_kernel import merge_lse_kernel

    def kernels() -> int:
        return sum(len(of_device[0]) for of_device in merge_lse_kernel.device_caches.values())

    def merge(num_tokens: int, start: int) -> None:
        shape = (1, num_tokens, 6, 48)
        out, new_out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        lse = torch.randn(shape[:3], device="cuda")
        by_head = torch.randn(1, 6, num_tokens, device="cuda").transpose(1, 2)
        for a, b in ((lse, by_head), (by_head, lse.clone())):
            merge_lse_(out[:, start:], a[:, start:], new_out[:, start:], b[:, start:])

    merge(64, 0)
    before = kernels()
    for num_tokens, start in ((64, 16), (64, 63), (37, 0), (37, 5), (2, 0), (2, 1)):
        merge(num_tokens, start)
    assert kernels() == before


def test_ring_of_eight_errs_no_more_than_twice_one_device() -> None:
    """Eight ranks' blocks on one device, bfloat16: forward and dq, dk, dv of the cuDNN path."""
    num_tokens = 32768
    torch.manual_seed(0)
    streams = [
        torch.randn(1, num_tokens, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    ]
    alone = SequenceLayout.zigzag((0, num_tokens), 1)
    one = _over_blocks(alone, streams)
    ring = _over_blocks(SequenceLayout.zigzag((0, num_tokens), 8), streams)
    exact = _over_blocks(alone, [x.float() for x in streams])
    for what, x, y, ref in zip(("out", "dq", "dk", "dv"), ring, one, exact, strict=True):
        ring_error = ((x.double() - ref).norm() / ref.norm()).item()
        one_error = ((y.double() - ref).norm() / ref.norm()).item()
        assert ring_error <= 2 * one_error, (what, ring_error, one_error)


def _over_blocks(layout: SequenceLayout, streams: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every rank's work in turn, as the ring does it; whole-stream results."""
    size = layout.world_size
    q, k, v, dout = ([layout.shard(x, rank) for rank in range(size)] for x in streams)
    outs, grads = [], [Gradients.of(*x) for x in zip(q, k, v, strict=True)]
    for rank in range(size):
        merged = PartialOutput(q[rank], v[rank].shape[-1])
        steps = [(rank - t) % size for t in range(size)]
        for other in steps:
            tiles = block_tiles(layout, layout, rank, other, Mask())
            attend(merged, q[rank], k[other], v[other], tiles, scale=128**-0.5)
        out, lse = merged.result()
        outs.append(out)
        for other in steps:
            tiles = block_tiles(layout, layout, rank, other, Mask())
            sums = Gradients(grads[rank].dq, grads[other].dk, grads[other].dv)
            operands = Operands(dout[rank], q[rank], k[other], v[other], out, lse)
            attend_backward(sums, operands, tiles, scale=128**-0.5)
    by_rank = (outs, *([getattr(g, x).result() for g in grads] for x in ("dq", "dk", "dv")))
    return [layout.unshard(shards) for shards in by_rank]
