"""What the cluster's wires give, in the planner's cost file.

`seqpar doctor --cluster` times an all-to-all of one process a node, in groups of 2, 4, 8, ...
nodes and with a small and a large message. Each degree's line through both is a link of the cost
model: of a group of that degree whose ranks are each on a node of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from seqpar.errors import PlanError
from seqpar.planners.cost import GIB, CostModel, Link

__all__ = ["links_of", "write_links"]


def links_of(transfers: Iterable[tuple[int, int, float]]) -> list[Link]:
    """A link for every degree among (bytes that each device sends, degree, ms).

    Bandwidth is the slope between the smallest and the largest message, latency what is left of
    the small one; a slope that noise has turned counts the large message's time alone.
    """
    rows: dict[int, list[tuple[int, float]]] = {}
    for sent, degree, ms in transfers:
        rows.setdefault(degree, []).append((sent, ms))
    links = []
    for degree, sizes in sorted(rows.items()):
        (small, small_ms), (large, large_ms) = min(sizes), max(sizes)
        slope = (large_ms - small_ms) / max(large - small, 1)
        slope = slope if slope > 0 else large_ms / large
        latency_ms = max(0.0, small_ms - slope * small)
        rate = 1e3 / slope / GIB
        links.append(Link(degree=degree, nodes=degree, gib_per_s=rate, latency_ms=latency_ms))
    return links


def write_links(path: str, links: Iterable[Link]) -> None:
    """Put the links into a cost file, in place of those of the same degree and nodes.

    Raises:
        PlanError: the file is no cost file, or cannot be written.
    """
    cost = CostModel.load(path)
    by_place = {(link.degree, link.nodes): link for link in (*cost.links, *links)}
    kept = tuple(by_place[place] for place in sorted(by_place))
    text = json.dumps(replace(cost, links=kept).to_json(), indent=1)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise PlanError(f"cannot write the cost file {path}: {error.strerror}") from error
