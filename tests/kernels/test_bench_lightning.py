"""What the benchmark makes of its times: each peer's beside ours, of the same inputs alone."""

from __future__ import annotations

from typing import Any

from benchmarks.bench_lightning import Entry, compare, describe


def test_rows_say_how_many_times_as_long_each_peer_takes() -> None:
    def entry(name: str, kind: str, **more: Any) -> Entry:
        return Entry(name, lambda *_: None, kind, more)

    entries = [
        entry("seqpar", "lightning"), entry("fla C=64", "lightning"),
        entry("OpenNLPLab", "lightning"),
        entry("seqpar", "lightning", cu_seqlens=1), entry("fla C=64", "lightning", cu_seqlens=1),
        entry("seqpar", "token"), entry("fla C=64", "token"),
    ]  # fmt: skip
    times = [(1.0, 2.0), (3.0, 8.0), (10.0, 30.0), (2.0, 4.0), (5.0, 6.0), (2.0, 5.0), (4.0, None)]
    rows: list[dict[str, Any]] = []
    for one, (forward, backward) in zip(entries, times, strict=True):
        rows.append({"name": one.name, "forward_ms": forward, "forward_share": 0.5})
        if backward is not None:
            rows[-1] |= {"backward_ms": backward, "backward_share": 0.5}
    compare(entries, rows)
    assert rows[0]["times"] == {
        "fla C=64": {"forward": 3.0, "backward": 4.0},
        "OpenNLPLab": {"forward": 10.0, "backward": 15.0},
    }
    assert rows[3]["times"] == {"fla C=64": {"forward": 2.5, "backward": 1.5}}
    assert rows[5]["times"] == {"fla C=64": {"forward": 2.0}}
    assert "times" not in rows[1]
    assert "fla C=64 takes 3.00 / 4.00 times" in describe(rows[0])
