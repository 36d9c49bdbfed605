"""Scatter plans: which devices each sequence of a batch is spread over. Imports no torch."""
