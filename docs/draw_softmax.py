"""Draws the pictures of docs/softmax.md from the schedules that the operators follow.

    python docs/draw_softmax.py          # writes docs/softmax-*.svg

Four ranks, each with a colour. A matrix has a row for each query and a column for each key, in
stream order; a cell has the colour of the rank that works on the pair, and the step's number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from seqpar.layout import SequenceLayout
from seqpar.ops.ring_schedule import ring_schedule
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles, compact_keys
from seqpar.ops.ulysses import head_shares, subgroup

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
CELL = 20
RANKS = 4


class Picture:
    """An SVG in the making: rectangles and text on white."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def cell(
        self, x: float, y: float, rank: int, text: object = "", *, faint: bool = False
    ) -> None:
        """A square of the rank's colour."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{CELL - 1}" height="{CELL - 1}" '
            f'fill="{COLOURS[rank]}" fill-opacity="{0.35 if faint else 1}"/>'
        )
        colour = "#000" if faint else "#fff"
        self.text(x + CELL / 2, y + CELL * 0.72, text, anchor="middle", colour=colour)

    def text(
        self, x: float, y: float, text: object, *, anchor: str = "start", colour: str = "#000"
    ) -> None:
        if text != "":
            self.parts.append(
                f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
            )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif" font-size="12">'
        )
        background = '<rect width="100%" height="100%" fill="#fff"/>'
        return "\n".join(
            [head, f"<title>{self.title}</title>", background, *self.parts, "</svg>\n"]
        )


def ring() -> Picture:
    """The forward steps of a causal zigzag."""
    layout = SequenceLayout.zigzag((0, 16), RANKS)
    picture = Picture(660, 375, "Ring: who works on which pair of query and key, and at which step")
    _matrix(picture, layout, Mask(), 90, 40)
    _ranks(picture, 440, 40)
    lines = (
        "0  own block, while block 1 travels",
        "1  the right neighbour's block,",
        "    while block 2 travels",
        "2  the next one's",
        "3  the left neighbour's block:",
        "    kept, and backward begins with it",
    )
    for i, line in enumerate(lines):
        picture.text(440, 160 + 18 * i, line)
    return picture


def halo() -> Picture:
    """The same under a window, on contiguous spans."""
    layout = SequenceLayout.contiguous((0, 16), RANKS)
    picture = Picture(660, 375, "Halo: the ring under a window of three keys")
    _matrix(picture, layout, Mask(window=3), 90, 40)
    _ranks(picture, 440, 40)
    for i, line in enumerate(("0  own keys, while the halo travels", "3  the halo: two keys")):
        picture.text(440, 160 + 18 * i, line)
    return picture


def gather() -> Picture:
    """Packed documents on contiguous spans: only a document that is cut is fetched."""
    layout = SequenceLayout.contiguous((0, 6, 8, 16), RANKS)
    picture = Picture(660, 375, "Gather: all keys that a rank sees, fetched at once")
    _matrix(picture, layout, Mask(), 90, 40, show_steps=False)
    _ranks(picture, 440, 40)
    picture.text(440, 160, "bright  own keys")
    picture.text(440, 178, "pale    fetched before the attention")
    return picture


def ulysses() -> Picture:
    """Who holds which head of which token, before and inside the attention."""
    picture = Picture(660, 215, "Ulysses: tokens are traded for heads")
    _heads(picture, "before and after", 90, 40, degree=1)
    _heads(picture, "inside the attention", 370, 40, degree=4)
    return picture


def usp() -> Picture:
    """The same within pairs; the ring runs between them."""
    picture = Picture(660, 235, "USP: heads are traded within pairs, blocks travel between them")
    _heads(picture, "before and after", 90, 40, degree=1)
    _heads(picture, "inside the attention", 370, 40, degree=2)
    picture.text(370, 220, "ring: rank 0 with 2, rank 1 with 3")
    return picture


def pairs(layout: SequenceLayout, mask: Mask) -> Iterator[tuple[int, int, int, int]]:
    """(query, key, rank, step) of every pair, from the schedules; positions in the stream."""
    for rank in range(layout.world_size):
        schedule = ring_schedule(layout, layout, rank, mask, tuple(range(layout.world_size)))
        rows = layout.stream_positions(rank).tolist()
        for number, step in enumerate(schedule.forward):
            owner = rank if step.is_own else step.recv_from
            held = layout.stream_positions(owner).tolist()
            if not step.is_own:
                ranges, _ = compact_keys(block_tiles(layout, layout, rank, owner, mask))
                held = [held[i] for span in ranges for i in range(span.start, span.stop)]
            for tile in step.tiles:
                for row, key in _visible(tile):
                    yield rows[row], held[key], rank, number


def _visible(tile: Tile) -> Iterator[tuple[int, int]]:
    shift = tile.num_keys - tile.num_queries
    for i, j in itertools.product(range(tile.num_queries), range(tile.num_keys)):
        sees_left = tile.left is None or j >= i + shift - tile.left
        if sees_left and (tile.right is None or j <= i + shift + tile.right):
            yield tile.q_start + i, tile.k_start + j


def _matrix(
    picture: Picture,
    layout: SequenceLayout,
    mask: Mask,
    x: int,
    y: int,
    *,
    show_steps: bool = True,
) -> None:
    picture.text(x, y - 22, "keys, and whose they are")
    picture.text(8, y + 14, "queries")
    for rank in range(layout.world_size):
        for position in layout.stream_positions(rank).tolist():
            picture.cell(x + CELL * position, y - CELL + 2, rank, faint=True)
            picture.cell(x - CELL - 2, y + CELL * position, rank, faint=True)
    for query, key, rank, step in pairs(layout, mask):
        text = step if show_steps else ""
        picture.cell(x + CELL * key, y + CELL * query, rank, text, faint=step > 0)


def _ranks(picture: Picture, x: int, y: int) -> None:
    for rank in range(RANKS):
        picture.cell(x, y + 24 * rank, rank)
        picture.text(x + CELL + 6, y + 24 * rank + 14, f"rank {rank}")


def _heads(picture: Picture, title: str, x: int, y: int, *, degree: int) -> None:
    """Rows: heads. Columns: tokens. A cell has the colour of the rank that holds it."""
    layout = SequenceLayout.contiguous((0, 12), RANKS)
    shares = head_shares(8, 8, degree).queries
    picture.text(x, y - 8, f"{title}; columns: tokens")
    picture.text(8, y + 14, "8 heads")
    for rank in range(RANKS):
        place = subgroup(layout, degree, rank)
        held = [t for member in place.members for t in layout.stream_positions(member).tolist()]
        start, stop = shares[place.index]
        for token, head in itertools.product(held, range(start, stop)):
            picture.cell(x + CELL * token, y + CELL * head, rank, rank)


PICTURES = {"ring": ring, "ulysses": ulysses, "usp": usp, "gather": gather, "halo": halo}


def main() -> None:
    """Write all pictures beside this file."""
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"softmax-{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
