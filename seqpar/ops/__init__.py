"""Sequence-parallel operators: mathematics and one exchange each."""
