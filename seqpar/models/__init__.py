"""The seed architectures, written on the operators."""

from seqpar.models.decoder import Decoder, DecoderConfig, hybrid, transnormer
from seqpar.models.mixers import LightningMixer, SoftmaxMixer, lightning_log_decay

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LightningMixer",
    "SoftmaxMixer",
    "hybrid",
    "lightning_log_decay",
    "transnormer",
]
