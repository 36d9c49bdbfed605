"""seqpar: distributed long-sequence parallelism on torch, Triton, PuLP and Ray."""

__version__ = "0.1.0"
