"""What the benchmarks of wrapped models share: shapes, random models, streams, clock and memory."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import seqpar
from seqpar.batch import Batch, pack, shard
from seqpar.mesh import init_mesh

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True,
}
MINIMAX = {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 2,
    "vocab_size": 32768,
    "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True,
}
FAILURES = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError)
"""What is recorded of a way, and not raised."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}


class Machine:
    """One process's device and mesh; builds models and streams for it, times and frees."""

    def __init__(self, *, tiny: bool, time_limit_s: float, ways: Sequence[str]) -> None:
        self.tiny, self.time_limit_s, self.ways = tiny, time_limit_s, ways
        self.began = time.perf_counter()
        self.mesh = init_mesh(sp=int(os.environ.get("WORLD_SIZE", "1")))["sp"]
        self.ranks = self.mesh.size()
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def hardware(self) -> dict[str, str]:
        import transformers

        return {
            "device": torch.cuda.get_device_name() if self.cuda else platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "seqpar": seqpar.__version__,
        }

    def model(self, family: str, sizes: dict[str, Any], *, checkpointed: bool) -> nn.Module:
        """A random model in training mode, bf16 on CUDA."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.tiny:
            kinds = {"layer_types": ["linear_attention", "full_attention"]}
            sizes = {**sizes, **TINY, **(kinds if "layer_types" in sizes else {})}
        config = AutoConfig.for_model(family, **sizes)
        torch.manual_seed(0)
        with self.device:
            dtype = torch.bfloat16 if self.cuda else torch.float32
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if checkpointed:
            recompute_layers(model)
        return model.train()

    def tokens(self, count: int) -> int:
        return count // 256 if self.tiny else count

    def batch(self, num_tokens: int, where: Any, layout: str) -> Batch:
        """One document."""
        generator = torch.Generator().manual_seed(1)
        document = torch.randint(0, 256, (num_tokens,), generator=generator)
        return shard(pack([document]), where, layout=layout, device=self.device)  # type: ignore[arg-type]

    def time_ms(
        self, model: nn.Module, step: Callable[[], Any], *, repeats: int
    ) -> tuple[float, Any]:
        """Median of forward and backward after one that is not counted, the slowest rank's; and
        what the step returned last."""
        times, returned = [], None
        for repeat in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            self.wait()
            started = time.perf_counter()
            returned = step()
            self.wait()
            if repeat:
                times.append((time.perf_counter() - started) * 1e3)
        model.zero_grad(set_to_none=True)
        return round(self.slowest(statistics.median(times)), 2), returned

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum of all ranks' values."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: float, operation: Any) -> float:
        reduced = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.all_reduce(reduced, op=operation)
        return float(reduced)

    def peak_gib(self) -> float:
        """Most memory that tensors have held since `free`, on the fullest rank; 0 on the CPU."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        return round(self.slowest(peak / 2**30), 3)

    def left_out(self) -> dict[str, Any] | None:
        """What stands in the results in place of something that would begin too late."""
        elapsed = self.slowest(time.perf_counter() - self.began)
        if elapsed <= self.time_limit_s:
            return None
        return {"left_out": f"would have begun after {elapsed:.0f} s"}

    def every(self, value: float) -> list[float]:
        """All ranks' values."""
        mine = torch.tensor([value], device=self.device, dtype=torch.float64)
        values = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(values, mine)
        return [float(each) for each in values]

    def finish(self) -> None:
        """Until this device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def wait(self) -> None:
        """Until no device has."""
        self.finish()
        dist.barrier()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def recompute_layers(model: nn.Module) -> None:
    """Activation checkpointing of every layer, as transformers does it."""
    any_model: Any = model
    any_model.gradient_checkpointing_enable({"use_reentrant": False})
