"""A short sequence-parallel training that survives faults: what the fault harness runs.

Each step draws 3 documents from a seeded sampler, scatters the packed stream over all ranks, and
trains one lightning layer on it. Every step is one line in steps.jsonl of rank 0: attempt, world
size, documents, loss. Checkpoints hold weights, optimizer, data position and random state.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqpar.launch.checkpoint import CheckpointStore
from seqpar.launch.context import current_run
from seqpar.layout import SequenceLayout
from seqpar.ops.state import state_attention

VOCAB, DIM, HEADS = 17, 16, 2


@dataclass
class Sampler:
    """Documents in a seeded order; its position and generator are its whole state."""

    generator: torch.Generator
    position: int = 0

    def draw(self) -> list[tuple[int, Tensor]]:
        """Three documents: their numbers and tokens."""
        drawn = []
        for _ in range(3):
            length = int(torch.randint(4, 20, (1,), generator=self.generator))
            tokens = torch.randint(0, VOCAB, (length,), generator=self.generator)
            drawn.append((self.position, tokens.cumsum(0) % VOCAB))
            self.position += 1
        return drawn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(
        self, ids: Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None
    ) -> Tensor:
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (3 * HEADS, -1)).chunk(3, dim=2)
        log_decay = torch.tensor([-0.1, -0.5])
        mixed, _ = state_attention(q, k, v, log_decay=log_decay, layout=layout, group=group)
        return self.head(mixed.flatten(2))


def train_step(model: Model, optimizer: torch.optim.Optimizer, documents: list[Tensor]) -> float:
    """One step over all ranks; the mean loss per token of the whole stream."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stream = torch.cat(documents)[None]
    bounds = [0, *torch.tensor([len(document) for document in documents]).cumsum(0).tolist()]
    layout = SequenceLayout.contiguous(bounds, world)
    ids = layout.shard(stream, rank)
    labels = layout.shard(layout.next_token_labels(stream), rank)
    group = dist.group.WORLD if world > 1 else None
    logits = model(ids, layout, group)
    total = (layout.next_token_labels(stream) != -100).sum()
    loss = (
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total
    )
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    optimizer.step()
    return mean.item()


def compute_for_ever(*_: object) -> None:
    """What the fault harness asks for: a rank that never comes to its next collective."""
    while True:
        time.sleep(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step-s", type=float, default=0.05, help="least time of a step")
    settings = parser.parse_args()
    run = current_run()
    signal.signal(signal.SIGUSR2, compute_for_ever)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=run.collective_timeout)
    torch.manual_seed(0)
    model, sampler = Model(), Sampler(torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    store = CheckpointStore(run.checkpoint_dir, run_id=run.run_id)
    first = resume(store, model, optimizer, sampler) if run.resume else 0
    for step in range(first, settings.steps):
        ends = time.monotonic() + settings.step_s
        drawn = sampler.draw()
        loss = train_step(model, optimizer, [tokens for _, tokens in drawn])
        time.sleep(max(0.0, ends - time.monotonic()))
        numbers = [number for number, _ in drawn]
        run.report(step=step, loss=loss, group=range(dist.get_world_size()), documents=numbers)
        line = {"attempt": run.attempt, "pid": os.getpid(), "world": dist.get_world_size()}
        line |= {"step": step, "documents": numbers, "loss": loss, "time": time.time()}
        if run.rank == 0:
            with Path(run.run_dir / "steps.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % 4 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            store.save_async(step + 1, state, sampler_state(sampler))
    store.close()
    dist.destroy_process_group()


def sampler_state(sampler: Sampler) -> dict[str, object]:
    return {"position": sampler.position, "random": sampler.generator.get_state()}


def resume(
    store: CheckpointStore, model: Model, optimizer: torch.optim.Optimizer, sampler: Sampler
) -> int:
    """Load the newest whole checkpoint; the step to go on with."""
    found = store.latest_complete()
    if found is None:
        return 0
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    extra = store.load(found, state)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sampler.position = extra["position"]
    sampler.generator.set_state(extra["random"])
    return found.step


if __name__ == "__main__":
    main()
