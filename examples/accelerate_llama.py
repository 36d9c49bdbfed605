"""Train a wrapped model with accelerate, two streams at once, each over two ranks.

    torchrun --nproc-per-node 4 examples/accelerate_llama.py

Runs on CPU with gloo as on GPUs with NCCL. The data are random documents of uneven lengths; put
your own DataLoader in `documents`.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import seqpar
from seqpar.adapters.tiny import tiny_model
from seqpar.batch import Batch
from seqpar.loaders import SequenceParallelLoader, collate_documents
from seqpar.loss import count_targets, token_loss
from seqpar.mesh import init_mesh
from seqpar.wrap import parallelize


def documents(rank: int, ranks: int) -> DataLoader:
    """Every rank reads its own rows, two documents a batch."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 90, (32,), generator=generator).tolist()
    rows = [{"input_ids": torch.arange(n) % 7 + 3 + n % 5} for n in lengths]
    return DataLoader(rows[rank::ranks], batch_size=2, collate_fn=collate_documents)


def main(words: list[str] | None = None) -> dict[str, list[float]]:
    """Train for one epoch; the losses and gradient norms by step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sp", type=int, default=2, help="ranks of one stream")
    options = parser.parse_args(words)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    ranks = accelerator.num_processes
    mesh = init_mesh(dp=ranks // options.sp, sp=options.sp)
    model = parallelize(tiny_model("llama"), mesh["sp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = documents(accelerator.process_index, ranks)
    loader = SequenceParallelLoader(rows, mesh["sp"], layout="zigzag", device=accelerator.device)

    losses, norms, step = [], [], list[Batch]()
    for batch in loader:
        step.append(batch)
        if len(step) < options.sp:  # every rank's rows once: a step holds the same for any sp
            continue
        targets = count_targets(step, mesh=mesh)
        total = 0.0
        for index, micro_batch in enumerate(step):
            if index < len(step) - 1:
                with accelerator.no_sync(model):
                    total += backward(accelerator, model, micro_batch, mesh, targets)
            else:
                total += backward(accelerator, model, micro_batch, mesh, targets)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        step = []
    accelerator.print(f"seqpar {seqpar.__version__}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return {"loss": losses, "grad_norm": norms}


def backward(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batch: Batch,
    mesh: torch.distributed.device_mesh.DeviceMesh,
    targets: int,
) -> float:
    """One micro-batch's share of the step's mean loss."""
    logits = model(**batch.inputs).logits
    loss = token_loss(logits, batch, mesh=mesh, num_targets=targets)
    accelerator.backward(loss)
    return loss.item()


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
