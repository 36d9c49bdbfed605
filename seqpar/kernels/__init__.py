"""Per-device mathematics, no communication: Triton, with a PyTorch path for CPU."""
