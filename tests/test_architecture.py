"""Imports run downwards only, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "seqpar"

# Each part may import the parts in its list (and itself). `planners` stands alone.
ALLOWED = {
    "errors": set(),
    "layout": {"errors"},
    "balance": {"errors", "layout"},
    "process_groups": {"errors"},
    "comm": {"errors", "layout", "kernels", "process_groups", "peers", "messages", "pending"},
    "messages": {"errors", "kernels", "process_groups", "peers", "pending"},
    "pending": set(),
    "peers": {"errors", "kernels", "process_groups"},
    "mesh": {"errors", "layout", "comm"},
    "kernels": {"errors", "layout"},
    "planners": {"errors"},
    "ops": {"errors", "layout", "comm", "mesh", "kernels", "planners"},
    "batch": {"errors", "layout", "balance", "comm", "mesh"},
    "loss": {"errors", "layout", "comm", "mesh", "kernels", "batch"},
    "models": {"errors", "layout", "comm", "mesh", "ops", "kernels"},
    "adapters": {"errors", "layout", "comm", "mesh", "ops", "kernels", "models", "batch", "loss"},
    "launch": {"errors"},
}
# fmt: off
TOP = {
    "errors", "layout", "balance", "comm", "messages", "pending", "process_groups", "peers", "mesh",
    "kernels", "ops", "batch", "loss", "models", "adapters", "planners", "launch", "data",
    "training", "calibration", "comparison", "ranks", "feedback", "report", "report_html",
    "console", "wrap", "parity", "commands",
}
# fmt: on
BEHIND_COMM = {"messages", "pending"}
"""`comm` is the one door to these."""


def _imports(path: Path) -> set[str]:
    """Parts of seqpar that the file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "seqpar":
                names = [f"seqpar.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("seqpar.")}
    return found


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(
    path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    part = _part(path)
    allowed = ALLOWED.get(part, TOP - BEHIND_COMM) | {part}
    assert _imports(path) & TOP <= allowed
    if part not in {"commands", "cli"}:
        assert "commands" not in _imports(path)


def test_every_part_is_drawn() -> None:
    parts = {_part(path) for path in FILES}
    drawn = (ROOT.parent / "docs" / "architecture.md").read_text()
    assert not [part for part in parts if part not in drawn]
