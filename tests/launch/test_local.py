"""The local engine, on real processes: output, exit codes, a killed rank, nothing left behind."""

from __future__ import annotations

import json

import pytest


def test_a_job_runs_and_leaves_its_logs(seqpar, write_script, tmp_path):
    script = write_script(
        """
        print("rank", rank, "of", world, "sum", int(total.item()), sys.argv[1:])
        print("to stderr", rank, file=sys.stderr)
        """
    )
    outcome = seqpar("launch", "--nproc", 3, script, "--", "--steps", "2")
    assert outcome.returncode == 0, outcome.stderr
    assert "rank 0 of 3 sum 3 ['--steps', '2']" in outcome.stdout
    assert "rank 1" not in outcome.stdout
    for rank in range(3):
        log = (tmp_path / "runs" / "train" / "logs" / f"rank-{rank}.log").read_text()
        assert f"rank {rank} of 3 sum 3" in log
        assert f"to stderr {rank}" in log
    state = json.loads((tmp_path / "runs" / "train" / "run.json").read_text())
    assert (state["state"], state["exit_code"], state["ranks"]) == ("succeeded", 0, 3)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("if rank == 1: sys.exit(7)", 7, "rank 1 exited with code 7"),
        ("if rank == 2: os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 2 was killed by SIGKILL"),
        ("if rank == 1: raise ValueError('bad batch')", 1, "ValueError: bad batch"),
    ],
)
def test_a_failed_rank_ends_the_job_with_its_name_and_code(
    seqpar, write_script, tmp_path, body, code, words
):
    script = write_script(body + "\ndist.all_reduce(total)\ntime.sleep(60)\n")
    outcome = seqpar("launch", "--nproc", 3, script)
    assert outcome.returncode == code
    last = outcome.stderr.strip().splitlines()[-1]
    assert words in last
    assert "it had no restarts" in last
    state = json.loads((tmp_path / "runs" / "train" / "run.json").read_text())
    assert (state["state"], state["failed_rank"]) == ("failed", 2 if code == 137 else 1)
    if code == 1:
        trace = outcome.stderr.rpartition("Traceback (most recent call last):\n")[2]
        assert trace.startswith(f'  File "{script}", line')  # whole, before the last line
        assert "in <module>" in trace
