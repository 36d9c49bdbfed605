"""What wrapping costs and what it buys: Llama- and MiniMax-shaped models of 1B parameters.

    torchrun --nproc-per-node 2 benchmarks/bench_wrap.py --out wrap.json       # two GPUs
    torchrun --nproc-per-node 2 benchmarks/bench_wrap.py --tiny --out /tmp/w   # the same on CPU

- parity: tiny fp32 models on these ranks against one device.
- overhead: the wrapped model on one rank against the unwrapped one with torch's attention.
- scaling: tokens a second a GPU on all ranks, by strategy, against one GPU on the same stream
  (share = one GPU's time over ranks times ours) and against torch's context parallelism, which
  is what accelerate's `ParallelismConfig(cp_size=...)` turns on.
- longest: peak memory at two lengths; the line through them gives the longest stream that fits.
- hybrid: seven lightning layers to one softmax layer, with experts: share of ideal scaling.

A section that would begin after the time limit is left out and said so in the results.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqpar
from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import Batch, pack, shard
from seqpar.loss import chunked_token_loss, token_loss_sum
from seqpar.mesh import init_mesh
from seqpar.parallelize import parallelize, unparallelize
from seqpar.parity import check_parity

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
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
FAILURES = (RuntimeError, ImportError, ValueError, TypeError, AttributeError)


class Bench:
    """One process's part of the benchmark: device, mesh, clock and results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.perf_counter()
        self.mesh = init_mesh(sp=int(os.environ.get("WORLD_SIZE", "1")))["sp"]
        self.ranks = self.mesh.size()
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.results: dict[str, Any] = {"hardware": self.hardware(), "ranks": self.ranks}

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

        if self.options.tiny:
            kinds = {"layer_types": ["linear_attention", "full_attention"]}
            sizes = {**sizes, **TINY, **(kinds if "layer_types" in sizes else {})}
        config = AutoConfig.for_model(family, **sizes)
        torch.manual_seed(0)
        with self.device:
            dtype = torch.bfloat16 if self.cuda else torch.float32
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def tokens(self, count: int) -> int:
        return count // 256 if self.options.tiny else count

    def batch(self, num_tokens: int, where: Any, layout: str) -> Batch:
        generator = torch.Generator().manual_seed(1)
        document = torch.randint(0, 256, (num_tokens,), generator=generator)
        return shard(pack([document]), where, layout=layout, device=self.device)  # type: ignore[arg-type]

    def time_ms(self, model: nn.Module, step: Callable[[], None], *, repeats: int) -> float:
        """Median of forward and backward after one that is not counted; the slowest rank's."""
        times = []
        for repeat in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            self.wait()
            started = time.perf_counter()
            step()
            self.wait()
            if repeat:
                times.append((time.perf_counter() - started) * 1e3)
        model.zero_grad(set_to_none=True)
        slowest = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return round(float(slowest), 2)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def section(self, name: str) -> None:
        """Run a section unless the time is up; what fails is recorded, not hidden."""
        elapsed = torch.tensor(time.perf_counter() - self.began, device=self.device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        if float(elapsed) > self.options.time_limit_s:
            self.results[name] = {"left_out": f"would have begun after {float(elapsed):.0f} s"}
        else:
            try:
                self.results[name] = getattr(self, name)()
            except FAILURES as error:
                self.results[name] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        self.free()
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - self.began
            print(f"[{seconds:5.1f} s] {name}: {json.dumps(self.results[name])}", flush=True)
            Path(self.options.out).write_text(json.dumps(self.results, indent=2))

    # -- sections -----------------------------------------------------------------------------

    def overhead(self) -> dict[str, Any]:
        """One rank, no exchange: the wrapped call against the model's own."""
        count = self.tokens(32768)
        model = self.model("llama", LLAMA, checkpointed=False)
        batch = self.batch(count, None, "contiguous")

        def step(inputs: dict[str, Any]) -> None:
            (token_loss_sum(model(**inputs).logits, batch.labels)[0] / count).backward()

        plain = functools.partial(step, {"input_ids": batch.ids, "use_cache": False})
        found: dict[str, Any] = {"tokens": count, "sdpa_ms": self.time_ms(model, plain, repeats=3)}
        if self.cuda:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                found["sdpa_cudnn_ms"] = self.time_ms(model, plain, repeats=3)
        parallelize(model, None)
        wrapped = functools.partial(step, batch.inputs)
        found["wrapped_ms"] = self.time_ms(model, wrapped, repeats=3)
        best = min(value for name, value in found.items() if name.startswith("sdpa"))
        return {**found, "wrapped_over_best": round(found["wrapped_ms"] / best, 4)}

    def parity(self) -> dict[str, Any]:
        """Tiny fp32 models on these ranks against one device: (loss error, gradient error)."""
        found = {}
        for family in ("llama", "mistral", "minimax", "mamba2"):
            model = parallelize(tiny_model(family).to(self.device), self.mesh)
            stream = tiny_stream(model, (130, 1, 290, 27))
            batch = shard(stream, self.mesh, layout="zigzag", device=self.device)
            report = check_parity(model, batch, loss_tolerance=1.0, gradient_tolerance=1.0)
            found[family] = (report.loss_error, report.gradient_error, report.worst_parameter)
        return found

    def hybrid(self) -> dict[str, Any]:
        """A MiniMax-shaped model, 65,536 tokens a rank, against one GPU on the whole stream."""
        count = self.tokens(65536) * self.ranks
        model = self.model("minimax", MINIMAX, checkpointed=True)
        found = {"parameters": sum(p.numel() for p in model.parameters()), "tokens": count}
        return {**found, **self.strategies(model, count)}

    def scaling(self) -> dict[str, Any]:
        """All ranks on one stream, layers recomputed, by strategy and peer."""
        count = self.tokens(65536)
        model = self.model("llama", LLAMA, checkpointed=True)
        found = {"parameters": sum(p.numel() for p in model.parameters()), "tokens": count}
        found |= self.strategies(model, count)
        one = found["one_gpu"]["ms"]
        try:
            step = functools.partial(self.torch_context_parallel, model, count)
            took = self.time_ms(model, step, repeats=2)
            found["torch_context_parallel"] = self.rate(count, took, self.ranks, one)
        except FAILURES as error:
            found["torch_context_parallel"] = f"{type(error).__name__}: {error}"[:300]
        return {**found, "alst_ulysses": "DeepSpeed is not installed"}

    def strategies(self, model: nn.Module, count: int) -> dict[str, Any]:
        def took(where: Any, strategy: str, layout: str, repeats: int) -> float:
            parallelize(model, where, strategy=strategy)
            batch = self.batch(count, where, layout)
            time_ms = self.time_ms(
                model, lambda: chunked_token_loss(model, batch).backward(), repeats=repeats
            )
            unparallelize(model)
            return time_ms

        one = took(None, "auto", "contiguous", 1)
        found: dict[str, Any] = {"one_gpu": self.rate(count, one, 1, one)}
        for strategy, layout in (("ring", "zigzag"), ("ulysses", "contiguous")):
            split = took(self.mesh, strategy, layout, 2)
            found[f"{strategy}_{layout}"] = self.rate(count, split, self.ranks, one)
        return found

    def rate(self, count: int, took_ms: float, ranks: int, one_ms: float) -> dict[str, float]:
        return {
            "ms": took_ms,
            "tokens_per_s_per_gpu": round(count / took_ms * 1e3 / ranks),
            "share_of_ideal": round(one_ms / (ranks * took_ms), 4),
        }

    def torch_context_parallel(self, model: nn.Module, count: int) -> None:
        """A step under torch's context parallelism, called as accelerate calls it."""
        from torch.distributed.tensor.experimental import context_parallel

        batch = self.batch(count, None, "contiguous")
        positions = torch.arange(count, device=self.device)[None]
        buffers: list[Tensor] = [batch.ids, batch.labels, positions]
        hooks = [
            module.register_forward_pre_hook(_causal_without_mask, with_kwargs=True)
            for name, module in model.named_modules()
            if name.endswith("self_attn")
        ]
        with context_parallel(
            self.mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
        ):
            # A mask of four dims is passed on as it is, so that none is built for nothing.
            logits = model(
                input_ids=batch.ids,
                attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
                position_ids=positions,
                use_cache=False,
            ).logits
            (token_loss_sum(logits, batch.labels)[0] / count).backward()
        for hook in hooks:
            hook.remove()

    def longest(self) -> dict[str, Any]:
        """Peak memory of a training step at two lengths, AdamW's states included, by peer."""
        if not self.cuda:
            return {"left_out": "peak memory is read on CUDA only"}
        model = self.model("llama", LLAMA, checkpointed=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def ours(count: int) -> None:
            batch = self.batch(count, self.mesh, "zigzag")
            chunked_token_loss(model, batch).backward()

        parallelize(model, self.mesh, strategy="ring")
        found = {"seqpar_ring_zigzag": self.line(optimizer, ours)}
        unparallelize(model)
        try:
            peer = functools.partial(self.torch_context_parallel, model)
            found["torch_context_parallel"] = self.line(optimizer, peer)
        except FAILURES as error:
            found["torch_context_parallel"] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        return found

    def line(self, optimizer: torch.optim.Optimizer, step: Callable[[int], None]) -> dict[str, Any]:
        """Peaks at two lengths, and where the line through them meets 95% of the device."""
        peaks: dict[int, float] = {}
        for count in (65536, 131072):
            for _ in range(1 if peaks else 2):  # the optimizer's states exist after one step
                self.free()
                step(count)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            peaks[count] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        (low, at_low), (high, at_high) = peaks.items()
        slope = (at_high - at_low) / (high - low)
        room = torch.cuda.get_device_properties(0).total_memory / 2**30 * 0.95
        return {
            "peak_gib": peaks,
            "kib_per_token": round(slope * 2**20, 3),
            "longest_tokens_by_the_line": int(high + (room - at_high) / slope),
        }


def _causal_without_mask(module: nn.Module, arguments: Any, inputs: dict[str, Any]) -> Any:
    """What accelerate's context parallelism hooks into every attention layer."""
    return arguments, {**inputs, "attention_mask": None, "is_causal": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--time-limit-s", type=float, default=80.0)
    parser.add_argument("--sections", default="parity,overhead,scaling,hybrid,longest")
    bench = Bench(parser.parse_args())
    for name in bench.options.sections.split(","):
        bench.section(name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
