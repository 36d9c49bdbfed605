"""One decoder for both seed architectures: a list of mixers, each followed by a gated unit.

TransNormerLLM has lightning layers only, with LRPE-d in the first; the MiniMax-style hybrid has a
softmax layer in every few (MiniMax-01 uses one in eight, the demo one in four).

Shape letters: B batch, T tokens on this rank, C channels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqpar.comm import group_rank
from seqpar.layout import SequenceLayout
from seqpar.models.layers import SimpleGatedUnit, SimpleRMSNorm
from seqpar.models.mixers import LightningMixer, SoftmaxMixer, lightning_log_decay
from seqpar.ops.softmax_choice import Strategy

__all__ = ["Decoder", "DecoderConfig", "hybrid", "transnormer"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder. `softmax_every = n` makes every n-th layer a softmax layer."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    hidden: int
    softmax_every: int | None = None
    softmax_heads: int = 0
    softmax_kv_heads: int = 0
    softmax_head_dim: int = 0
    softmax_strategy: Strategy = "auto"
    use_lrpe: bool = False

    def is_softmax(self, layer: int) -> bool:
        return self.softmax_every is not None and (layer + 1) % self.softmax_every == 0


def transnormer(
    *, vocab_size: int, dim: int, num_layers: int, num_heads: int, hidden: int
) -> DecoderConfig:
    """TransNormerLLM: lightning attention in every layer, LRPE-d in the first."""
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=dim // num_heads,
        hidden=hidden,
        use_lrpe=True,
    )


def hybrid(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    hidden: int,
    softmax_every: int,
    softmax_heads: int,
    softmax_kv_heads: int,
    softmax_head_dim: int,
    softmax_strategy: Strategy = "auto",
) -> DecoderConfig:
    """MiniMax-style: lightning layers, and one grouped-query softmax layer in every few."""
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=dim // num_heads,
        hidden=hidden,
        softmax_every=softmax_every,
        softmax_heads=softmax_heads,
        softmax_kv_heads=softmax_kv_heads,
        softmax_head_dim=softmax_head_dim,
        softmax_strategy=softmax_strategy,
    )


class DecoderLayer(nn.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm, self.feed_forward_norm = SimpleRMSNorm(), SimpleRMSNorm()
        self.mixer: LightningMixer | SoftmaxMixer
        if config.is_softmax(layer):
            self.mixer = SoftmaxMixer(
                config.dim,
                config.softmax_heads,
                config.softmax_kv_heads,
                config.softmax_head_dim,
                strategy=config.softmax_strategy,
            )
        else:
            self.mixer = LightningMixer(
                config.dim,
                config.num_heads,
                config.head_dim,
                lightning_log_decay(config.num_heads, layer, config.num_layers),
                use_lrpe=config.use_lrpe and layer == 0,
            )
        self.feed_forward = SimpleGatedUnit(config.dim, config.hidden)

    def forward(
        self,
        x_BTC: Tensor,
        positions_T: Tensor,
        *,
        layout: SequenceLayout,
        group: ProcessGroup | None,
        strategy: Strategy | None = None,
        check: bool = True,
    ) -> Tensor:
        options: dict[str, Any] = {"layout": layout, "group": group, "check": check}
        if isinstance(self.mixer, SoftmaxMixer):
            options["strategy"] = strategy
        x_BTC = x_BTC + self.mixer(self.mixer_norm(x_BTC), positions_T, **options)
        out: Tensor = x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))
        return out


class Decoder(nn.Module):
    """Token ids of one rank in, logits of the same tokens out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_layers)
        )
        self.norm = SimpleRMSNorm()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); projections back into the residual stream are scaled by depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("theta_HK"):
                continue
            depth_scale = (2 * self.config.num_layers) ** -0.5 if "output" in name else 1.0
            nn.init.normal_(parameter, std=0.02 * depth_scale)
        nn.init.normal_(self.embedding.weight, std=1.0)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        layout: SequenceLayout | None = None,
        group: ProcessGroup | None = None,
        strategy: Strategy | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the rank's tokens.

        Args:
            input_ids: int64 [B, T], the rank's token ids.
            position_ids: int64 [1, T], positions within documents; from the layout by default.
            layout: where the packed stream's tokens live; by default each row is one whole
                document on this rank alone.
            group: the ranks of the layout; None for this rank alone.
            strategy: how softmax layers exchange in this call; the configured one by default.
        """
        if layout is None:
            layout = SequenceLayout.contiguous((0, input_ids.shape[1]), 1)
        if position_ids is None:
            position_ids = layout.position_ids(group_rank(group))[None].to(input_ids.device)
        x_BTC, positions_T = self.embedding(input_ids), position_ids[0]
        for index, layer in enumerate(self.layers):
            # What fits one layer fits all of them: the ranks compare notes once a batch.
            x_BTC = layer(
                x_BTC,
                positions_T,
                layout=layout,
                group=group,
                strategy=strategy,
                check=index == 0,
            )
        logits_BTV: Tensor = self.head(self.norm(x_BTC))
        return logits_BTV
