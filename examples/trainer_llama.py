"""Train a wrapped model with transformers' Trainer, two streams at once, each over two ranks.

    torchrun --nproc-per-node 4 examples/trainer_llama.py

What differs from an ordinary Trainer script: `parallelize`, a collator that pads nothing, a loader
around the Trainer's own, and a loss function. Runs on CPU with gloo as on GPUs with NCCL.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from seqpar.adapters.tiny import tiny_model
from seqpar.loaders import TrainerLoader, collate_documents
from seqpar.loss import trainer_loss
from seqpar.mesh import init_mesh
from seqpar.wrap import parallelize


class Documents(Dataset):
    """Random documents of uneven lengths; put your own data set here."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(2, 90, (32,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = self.lengths[index]
        return {"input_ids": torch.arange(length) % 7 + 3 + length % 5}


class SequenceParallelTrainer(Trainer):
    """The Trainer's own loader gives each rank its rows; this one lets ranks share them."""

    mesh: torch.distributed.device_mesh.DeviceMesh

    def get_train_dataloader(self) -> DataLoader:
        return TrainerLoader(super().get_train_dataloader(), self.mesh["sp"], layout="zigzag")

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        loader = super().get_eval_dataloader(eval_dataset)
        return TrainerLoader(loader, self.mesh["sp"], layout="zigzag")


def main(words: list[str] | None = None) -> dict[str, list[float]]:
    """Train for one epoch; the losses and gradient norms by step, and the loss of evaluation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sp", type=int, default=2, help="ranks of one stream")
    options = parser.parse_args(words)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=options.sp,  # a step holds the same for any sp
            num_train_epochs=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
        )
        mesh = init_mesh(dp=arguments.world_size // options.sp, sp=options.sp)
        trainer = SequenceParallelTrainer(
            model=parallelize(tiny_model("llama"), mesh["sp"]),
            args=arguments,
            train_dataset=Documents(),
            eval_dataset=Documents(),
            data_collator=collate_documents,
            compute_loss_func=trainer_loss,
        )
        trainer.mesh = mesh
        trainer.train()
        held_out = trainer.evaluate()["eval_loss"]
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        if trainer.is_world_process_zero():
            print(f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, then {held_out:.4f}")
    curves = {key: [step[key] for step in steps] for key in ("loss", "grad_norm")}
    return {**curves, "eval_loss": [held_out]}


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
