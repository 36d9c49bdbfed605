"""Causal linear attention with decay."""
