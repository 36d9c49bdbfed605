"""Histograms of document lengths: read, counted, sampled."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from seqpar.errors import PlanError

__all__ = ["LengthHistogram"]


@dataclass(frozen=True)
class LengthHistogram:
    """Counts of document lengths: bin i holds lengths in [edges[i], edges[i+1]) tokens.

    Raises:
        PlanError: edges that do not increase, counts that do not match them or are all zero.
    """

    edges_tokens: tuple[int, ...]
    counts: tuple[int, ...]
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges_tokens", tuple(self.edges_tokens))
        object.__setattr__(self, "counts", tuple(self.counts))
        edges, counts = self.edges_tokens, self.counts
        if len(edges) != len(counts) + 1:
            raise PlanError(f"{len(counts)} counts need {len(counts) + 1} edges, got {len(edges)}")
        if any(b <= a for a, b in pairwise(edges)) or edges[0] < 0:
            raise PlanError("a histogram's edges must increase from 0 or more")
        if min(counts, default=0) < 0 or not sum(counts):
            raise PlanError("a histogram's counts must be at least 0, and not all 0")

    @classmethod
    def load(cls, path: str) -> LengthHistogram:
        """Read a JSON object with `edges_tokens` and `counts`.

        Raises:
            PlanError: the file cannot be read or is no histogram.
        """
        try:
            with open(path, encoding="utf-8") as file:
                data: Any = json.load(file)
            return cls(
                tuple(_integer(edge, "an edge") for edge in data["edges_tokens"]),
                tuple(_integer(count, "a count") for count in data["counts"]),
                str(data.get("source", "")),
            )
        except OSError as error:
            raise PlanError(f"cannot read the histogram {path}: {error.strerror}") from error
        except KeyError as error:
            raise PlanError(
                f"histogram {path} lacks {error}: it needs edges_tokens and counts"
            ) from error
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise PlanError(f"histogram {path}: {error}") from error
            raise PlanError(
                f"{path} is no histogram: a JSON object with the lists of integers edges_tokens "
                f"and counts ({error})"
            ) from error

    def share_over(self, tokens: int) -> float:
        """The share of documents that are longer than that, log-uniform within a bin."""
        over = 0.0
        for (low, high), count in zip(pairwise(self.edges_tokens), self.counts, strict=True):
            first, stop = max(1, low, tokens + 1), max(2, high)
            if first < stop:
                over += count * math.log(stop / first) / math.log(stop / max(1, low))
        return over / sum(self.counts)

    @classmethod
    def of(cls, lengths: Sequence[int], *, bins_per_octave: int = 2) -> LengthHistogram:
        """The histogram of some lengths, with that many bins to each doubling."""
        if not lengths or min(lengths) < 1:
            raise PlanError("a histogram needs lengths of at least 1 token")
        top = math.ceil(math.log2(max(lengths) + 1) * bins_per_octave)
        edges = sorted({round(2 ** (i / bins_per_octave)) for i in range(top + 2)})
        counts = [0] * (len(edges) - 1)
        for length in lengths:
            counts[next(i for i in range(len(counts)) if length < edges[i + 1])] += 1
        return cls(tuple(edges), tuple(counts))

    def sample(self, count: int, *, seed: int, max_tokens: int | None = None) -> list[int]:
        """Lengths drawn from the bins, log-uniform within a bin; longer than `max_tokens` dropped.

        The same seed gives the same lengths.

        Raises:
            PlanError: (almost) everything is longer than `max_tokens`.
        """
        rng = random.Random(seed)
        bounds = list(accumulate(self.counts))
        bins = range(len(self.counts))
        limit = max_tokens if max_tokens is not None else self.edges_tokens[-1]
        drawn: list[int] = []
        for _ in range(100):
            for i in rng.choices(bins, cum_weights=bounds, k=count):
                low, high = max(1, self.edges_tokens[i]), max(2, self.edges_tokens[i + 1])
                length = min(high - 1, int(math.exp(rng.uniform(math.log(low), math.log(high)))))
                if max(low, length) <= limit:
                    drawn.append(max(low, length))
                if len(drawn) == count:
                    return drawn
        raise PlanError(f"(almost) no length of the histogram is within {limit} tokens")


def _integer(value: object, what: str) -> int:
    """The number as an integer; a share of documents, say, is refused rather than cut to 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != int(value):
        raise PlanError(f"{what} is an integer, got {value!r}")
    return int(value)
