"""What links that are awake cost the ring at 65,536 tokens, and what letting them sleep gives back.

    torchrun --nproc-per-node 2 -m benchmarks.bench_links --output benchmarks/results/h200-x2

Two GPUs that read each other's memory. Rows in turns, forward and backward, each with both GPUs'
power and clock: one GPU; the ring, whose last gradients travel under the last heads of the own
block, so that links sleep between two calls; the same with those gradients sent before that block;
the ring's tiles alone, nothing sent; the tiles while 4 KiB at a time go over the links (next to no
bytes, but the links never sleep). Writes links.json into the output folder.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend

from benchmarks.bench_softmax import draw, on_ranks, sdpa, tiles_alone
from benchmarks.device_power import PowerLog
from benchmarks.rank_timing import Recorder, Row, Sample
from seqpar.layout import SequenceLayout
from seqpar.mesh import init_mesh
from seqpar.ops import ring_late
from seqpar.peers.sharing import engines_of

NUM_TOKENS = 65536
TINY_BYTES, PAUSE_S = 4096, 2e-4
ONE, RING, EARLY = "one GPU", "ring", "ring, last gradients early"
TILES, AWAKE = "tiles alone", "tiles alone, links awake"

Call = Callable[[], None]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/h200-x2"))
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    group = init_mesh(sp=2).get_group("sp")
    torch.manual_seed(dist.get_rank())
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    recorder = Recorder(arguments.output / "links.json", facts)
    with tempfile.TemporaryDirectory() as folder:
        log = PowerLog(Path(folder) / "power.txt", [_uuid(i) for i in range(2)])
        links = Links(group)
        with links.awake_on_demand(), log if recorder.rank == 0 else nullcontext():
            samples, spans = in_turns(recorder, calls(group, links), links, arguments.rounds)
        for what, own in samples.items():
            figures: dict[str, Any] = {"total_ms_by_rank": list(Sample.median(own).following)}
            if what != ONE:
                figures |= recorder.efficiencies(samples[ONE], own)
            figures |= log.means(spans[what]) if recorder.rank == 0 else {}
            recorder.row(what, **figures, samples_ms_by_rank=[list(s.following) for s in own])
    dist.destroy_process_group()


def _uuid(device: int) -> str:
    return "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


class Links:
    """The other GPU's inbox, written to over the links while other streams compute."""

    def __init__(self, group: ProcessGroup) -> None:
        self.rank = group.rank()
        layout = SequenceLayout.zigzag((0, NUM_TOKENS), 2)
        local = draw(layout.tokens_on(self.rank))
        self.ring = Row(RING, on_ranks(layout, group, strategy="ring", check=False), local)
        self.ring.calls()[1]()  # which makes the inboxes
        torch.cuda.synchronize()
        engines = engines_of(group)
        assert engines is not None, "the GPUs share no memory"
        self._far = engines._regions[1 - self.rank][-TINY_BYTES:]
        self._near = torch.zeros_like(self._far)
        self._stream = torch.cuda.Stream()
        self.awake, self._over = threading.Event(), threading.Event()

    @contextmanager
    def awake_on_demand(self) -> Iterator[None]:
        """While `awake` is set, 4 KiB are sent again and again by a thread."""
        thread = threading.Thread(target=self._keep_awake)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _keep_awake(self) -> None:
        torch.cuda.set_device(self.rank)
        while not self._over.is_set():
            if self.awake.wait(0.05):
                with torch.cuda.stream(self._stream):
                    self._far.copy_(self._near, non_blocking=True)
                time.sleep(PAUSE_S)


def calls(group: ProcessGroup, links: Links) -> dict[str, Call]:
    """Forward and backward of each row."""
    layout = SequenceLayout.zigzag((0, NUM_TOKENS), 2)
    ring = links.ring.calls()[1]
    tiles = Row(TILES, tiles_alone(layout, group.rank()), links.ring.tensors).calls()[1]

    def ring_early() -> None:
        with mock.patch.object(ring_late, "LEAST_S", math.inf):
            ring()

    def with_links_awake() -> None:
        links.awake.set()
        tiles()

    return {
        ONE: Row(ONE, sdpa(SDPBackend.CUDNN_ATTENTION), draw(NUM_TOKENS)).calls()[1],
        RING: ring,
        EARLY: ring_early,
        TILES: tiles,
        AWAKE: with_links_awake,
    }


def in_turns(
    recorder: Recorder, each: dict[str, Call], links: Links, rounds: int
) -> tuple[dict[str, list[Sample]], dict[str, list[tuple[float, float]]]]:
    """Samples of each row, and the times from and to which they were taken."""
    samples: dict[str, list[Sample]] = {what: [] for what in each}
    spans: dict[str, list[tuple[float, float]]] = {what: [] for what in each}
    order, draws = list(each), random.Random(5)  # the same on every rank
    for turn in range(rounds + 1):
        draws.shuffle(order)
        for what in order:
            start = time.monotonic()
            sample = recorder.sample(each[what], 1 if what == ONE else 3)
            links.awake.clear()
            if turn:  # the first round warms up
                samples[what].append(sample)
                spans[what].append((start, time.monotonic()))
    return samples, spans


if __name__ == "__main__":
    main()
