"""Train a byte-level hybrid decoder on the standard library's source, sequence-parallel.

An ordinary torch.distributed script: `seqpar launch examples/hybrid_lm/job.yaml` starts it, and so
does `torchrun --nproc-per-node 4 examples/hybrid_lm/train.py`. Every step draws documents of very
different lengths, plans which ranks each is scattered over, and runs the groups at the same time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from corpus import VOCAB_SIZE, load_corpus
from torch import Tensor

import seqpar
from seqpar import comm
from seqpar.calibration import calibrate_model
from seqpar.comparison import FixedDegreeRival
from seqpar.console import TrainingConsole
from seqpar.data import DocumentSampler, PlannedStep, PlannedSteps, limit_documents, recorded_plans
from seqpar.determinism import use_deterministic_algorithms, weights_digest
from seqpar.errors import ParityError
from seqpar.feedback import CostFeedback
from seqpar.launch.context import RunContext, current_run
from seqpar.mesh import GroupPool
from seqpar.models import Decoder, DecoderConfig, hybrid
from seqpar.planners import (
    Cluster,
    CostModel,
    Group,
    Planner,
    ScatterPlan,
    ScatterProblem,
    best_fixed_degree,
)
from seqpar.planners.process import PlannerProcess
from seqpar.report import RunReport, StepReport
from seqpar.training import PlanExecutor
from seqpar.training_state import TrainingState

PARITY_TOLERANCE = 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budget-tokens", type=int, default=65_536, help="tokens a step")
    parser.add_argument("--context-tokens", type=int, default=32_768)
    parser.add_argument("--over-limit", choices=["split", "drop"], default="split")
    parser.add_argument("--heldout-tokens", type=int, default=32_768)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cpu-memory-gib", type=float, default=1.1, help="for one CPU rank")
    parser.add_argument("--compare-every", type=int, default=3, help="0: do not compare")
    parser.add_argument("--checkpoint-every", type=int, default=4, help="steps")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--replay", type=Path, help="plans.jsonl of an earlier run; implies --deterministic"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="the same plans give the same bits on CUDA"
    )
    return parser.parse_args()


def load_documents(settings: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Training and held-out documents within the context limit."""
    limits = {"context_tokens": settings.context_tokens, "over_limit": settings.over_limit}
    training, heldout = (limit_documents(part, **limits) for part in load_corpus())
    every = max(1, sum(map(len, heldout)) // settings.heldout_tokens)
    return training, heldout[::every]


def decoder_config(settings: argparse.Namespace) -> DecoderConfig:
    """Lightning layers, and one softmax layer in every four."""
    return hybrid(
        vocab_size=VOCAB_SIZE,
        dim=settings.dim,
        num_layers=settings.layers,
        num_heads=4,
        hidden=3 * settings.dim // 2,
        softmax_every=4,
        softmax_heads=2,
        softmax_kv_heads=1,
        softmax_head_dim=settings.dim // 8,
        softmax_strategy="ring",
    )


class HybridLM:
    """The demo's run: documents, model, planner, and what has been measured so far."""

    def __init__(self, settings: argparse.Namespace, run: RunContext) -> None:
        self.start = time.perf_counter()
        self.settings, self.run = settings, run
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        mesh = seqpar.init_mesh(sp=ranks, timeout=run.collective_timeout)
        device = torch.device(mesh.device_type)
        self.documents, self.heldout = load_documents(settings)
        self.lengths = [len(document) for document in self.documents]
        torch.manual_seed(settings.seed)
        model = Decoder(decoder_config(settings)).to(device)
        self.executor = PlanExecutor(
            model,
            GroupPool(),
            world=dist.group.WORLD,
            device=device,
            on_group=self.report_progress,
        )
        self.documents_in_step: tuple[int, ...] = ()
        self.state = TrainingState(
            model,
            learning_rate=settings.learning_rate,
            total_steps=settings.steps,
            folder=run.checkpoint_dir,
            run_id=run.run_id,
        )
        visible = self.executor.rank == 0
        self.screen = TrainingConsole(total_steps=settings.steps, visible=visible)
        self.degrees = [d for d in settings.degrees if d <= self.executor.num_ranks]
        self.memory_bytes = self.memory_for_activations()

    def main(self) -> None:
        """Calibrate, prove parity, train, compare with a fixed degree, report."""
        is_resumed = self.state.restore()
        self.introduce(is_resumed)
        if not is_resumed:
            self.state.notes = {"cost": self.calibrate().to_json(), "steps": []}
        cost = CostModel.from_json(self.state.notes["cost"])
        self.feedback = CostFeedback(cost, self.state.notes.get("observations", ()))
        planning = PlannerProcess(Planner(time_limit_ms=50))

        def plan_documents(step: int, lengths: Sequence[int]) -> ScatterPlan:
            return planning.plan(self.problem(lengths, self.feedback.cost))

        steps = PlannedSteps(
            self.sampler(),
            recorded_plans(self.settings.replay) if self.settings.replay else plan_documents,
            group=dist.group.WORLD,
            first_step=self.state.step,
            record=self.run.run_dir / "plans.jsonl",
        )
        self.rival = FixedDegreeRival(self.executor, self.fixed_degree_plans(cost))
        with self.screen:
            self.train(steps)
        steps.close()
        planning.close()
        self.finish()

    def sampler(self) -> DocumentSampler:
        return DocumentSampler(
            self.lengths,
            budget_tokens=self.settings.budget_tokens,
            seed=self.settings.seed,
            position=self.state.position,
        )

    def fixed_degree_plans(self, cost: CostModel) -> dict[int, ScatterPlan]:
        """Every few steps, what the one degree that is best for all of them would do."""
        sampler, every = self.sampler(), self.settings.compare_every
        draws = {step: sampler.draw() for step in range(self.state.step, self.settings.steps)}
        compared = [step for step in draws if every and step % every == every - 1]
        if not compared or len(self.degrees) < 2:
            return {}
        problems = [self.problem([self.lengths[i] for i in draws[s]], cost) for s in compared]
        return dict(zip(compared, best_fixed_degree(problems), strict=True))

    def introduce(self, is_resumed: bool) -> None:
        parameters = sum(parameter.numel() for parameter in self.state.model.parameters())
        self.screen.say(
            f"{len(self.documents)} documents of {min(self.lengths)} to {max(self.lengths):,} "
            f"bytes, {sum(self.lengths):,} in all; a hybrid decoder of {parameters / 1e6:.1f} M "
            f"parameters on {self.executor.num_ranks} {self.executor.device.type} ranks"
        )
        if is_resumed:
            self.screen.say(f"resumed from the checkpoint after {self.state.step} steps")

    def memory_for_activations(self) -> float:
        """What a plan may use of every rank: on CUDA most of what is free, on CPU as told."""
        if self.executor.device.type == "cpu":
            return self.settings.cpu_memory_gib * 2**30
        free, _ = torch.cuda.mem_get_info()
        of_ranks = comm.all_gather(
            torch.tensor(0.8 * free, device=self.executor.device), self.executor.world
        )
        return of_ranks.min().item()

    def calibrate(self) -> CostModel:
        """The machine's costs, measured on all ranks; what rank 0 fitted is what all keep."""
        calibration = calibrate_model(self.executor, degrees=self.degrees, vocab_size=VOCAB_SIZE)
        self.screen.say(calibration.summary())
        return comm.broadcast_object(calibration.cost, self.executor.world)

    def problem(self, lengths: Sequence[int], cost: CostModel) -> ScatterProblem:
        cluster = Cluster(
            devices=self.executor.num_ranks,
            memory_bytes=self.memory_bytes,
            degrees=tuple(self.degrees),
        )
        return ScatterProblem(tuple(lengths), cluster, cost, context_tokens=max(self.lengths))

    def train(self, steps: PlannedSteps) -> None:
        """All remaining steps; the first of a fresh run is preceded by its proof of parity."""
        while self.state.step < self.settings.steps:
            planned = next(steps)
            if "parity" not in self.state.notes:
                self.screen.show_plan(planned, [self.lengths[i] for i in planned.documents])
                self.prove_parity(planned)
                self.evaluate()
            self.train_step(planned)
        self.evaluate()

    def train_step(self, planned: PlannedStep) -> None:
        result = self.rival.forward_backward(planned, self.documents_of(planned))
        self.state.take_step(position=planned.position)
        self.state.notes["steps"].append(vars(StepReport.of(planned, result)))
        self.feedback.observe(planned, result, self.lengths)
        self.state.notes["observations"] = self.feedback.observations
        self.screen.show_step(planned, result)
        rate = result.num_tokens / result.step_ms * 1e3
        self.run.report(step=self.state.step, loss=result.loss, tokens_per_s=rate)
        if self.state.step % self.settings.checkpoint_every == 0:
            self.state.save()

    def prove_parity(self, planned: PlannedStep) -> None:
        """Stop the run unless the first step agrees with one process."""
        parity = self.executor.check_parity(planned.plan, self.documents_of(planned))
        self.screen.say(
            f"parity of {self.executor.num_ranks} ranks with one process on this batch: relative "
            f"error {parity.relative_error:.1e} (loss {parity.loss_relative_error:.1e}, gradients "
            f"{parity.gradient_relative_error:.1e}, worst in {parity.worst_parameter})"
        )
        if not parity.relative_error < PARITY_TOLERANCE:
            raise ParityError(
                f"the ranks and one process differ by {parity.relative_error:.1e}, over "
                f"{PARITY_TOLERANCE:.0e}; the worst gradient is {parity.worst_parameter}'s"
            )
        self.state.notes["parity"] = parity.relative_error

    def evaluate(self) -> None:
        loss = self.executor.mean_loss(self.heldout)
        self.state.notes.setdefault("heldout", []).append((self.state.step, loss))
        self.screen.say(f"held-out loss after {self.state.step} steps: {loss:.3f} nats a byte")

    def report_progress(self, micro_batch: int, group: Group) -> None:
        """Where this rank is: `seqpar status` shows it, and a failure is told in these terms."""
        documents = [self.documents_in_step[i] for i in group.sequences if self.documents_in_step]
        self.run.report(
            step=self.state.step, micro_batch=micro_batch, group=group.ranks, documents=documents
        )

    def documents_of(self, planned: PlannedStep) -> list[Tensor]:
        self.documents_in_step = planned.documents
        return [self.documents[index] for index in planned.documents]

    def finish(self) -> None:
        """The last checkpoint, and the report."""
        self.state.save()
        self.state.close()
        if self.executor.rank != 0:
            return
        comparison = self.rival.result()
        if comparison.batches:
            self.screen.say(
                f"{comparison.speedup:.2f} times as fast as degree {comparison.fixed_degree} for "
                f"all, the best fixed degree, on {comparison.batches} of these batches, as measured"
            )
        notes, digest = self.state.notes, weights_digest(self.state.model)
        self.screen.say(f"weights after {self.state.step} steps: SHA-256 {digest}")
        report = RunReport(
            name=self.run.run_dir.name,
            heldout_loss_first=notes["heldout"][0][1],
            heldout_loss_last=notes["heldout"][-1][1],
            heldout=notes["heldout"],
            parity_relative_error=notes["parity"],
            wall_s=time.perf_counter() - self.start,
            comparison=comparison,
            ranks=self.executor.num_ranks,
            device=self.executor.device.type,
            document_lengths=self.lengths,
            cost=self.feedback.cost.to_json(),
            prediction_error=prediction_error(notes["steps"]),
            settings={key: str(value) for key, value in vars(self.settings).items()},
            steps=notes["steps"],
            weights_sha256=digest,
        )
        report.write(self.run.run_dir)
        self.screen.say(
            f"report: {self.run.run_dir / 'report.html'} ({report.wall_s:.0f} s in all)"
        )


def prediction_error(steps: Sequence[dict[str, Any]]) -> float:
    """Mean of |predicted - measured| / measured over the steps, as they were planned."""
    errors = [abs(s["predicted_ms"] / s["measured_ms"] - 1) for s in steps]
    return sum(errors) / len(errors)


def main() -> None:
    run = current_run()
    run.run_dir.mkdir(parents=True, exist_ok=True)
    settings = parse_arguments()
    if settings.deterministic or settings.replay:
        use_deterministic_algorithms()
    HybridLM(settings, run).main()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
