"""Who hangs: judged from beats, and found on real ranks within the bound."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from seqpar.launch.failure import Failure
from seqpar.launch.rundir import RunDir
from seqpar.launch.supervise import Ears, find_hang


def beat(collective=None, *, idle_s=0.0, quiet_s=0.0, where="train.py:7"):
    return {"collective": collective, "idle_s": idle_s, "quiet_s": quiet_s, "where": where}


@pytest.mark.parametrize(
    ("beats", "missing", "words"),
    [
        # one computes, the others wait for it
        ([beat("all_reduce", idle_s=9), beat(), beat("all_reduce", idle_s=8)], (1,), "train.py:7"),
        # one is not heard at all
        ([beat("all_reduce", idle_s=9), beat(quiet_s=6)], (1,), "no sign of life for 6 s"),
        # all wait, one in another call
        (
            [
                beat("all_reduce", idle_s=9),
                beat("broadcast", idle_s=9),
                beat("all_reduce", idle_s=9),
            ],
            (1,),
            "rank 1 in broadcast",
        ),
        # all wait in the same call: nobody is known to be at fault, the first is named
        ([beat("barrier", idle_s=9), beat("barrier", idle_s=9)], (0,), "as all ranks did"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(beats, missing, words):
    hang = find_hang(dict(enumerate(beats)), 5.0)
    assert hang is not None
    assert hang.missing == missing
    assert words in hang.reason


@pytest.mark.parametrize(
    "beats",
    [
        [],
        [beat("all_reduce", idle_s=4), beat()],  # within the bound
        [beat(idle_s=90), beat(idle_s=90)],  # long computation: nobody waits for anybody
        [beat("all_reduce", idle_s=9), beat("all_reduce", idle_s=0)],  # just arrived
        [beat("all_reduce", idle_s=0), beat(idle_s=0, quiet_s=4)],
    ],
)
def test_ranks_at_work_are_left_alone(beats):
    assert find_hang(dict(enumerate(beats)), 5.0) is None


def test_a_listener_that_slept_does_not_blame_the_ranks(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    ears = Ears()
    ears.hear({0: {"time": 1.0}})
    clock[0] += 500.0
    assert ears.hear({0: {"time": 1.0}})[0]["quiet_s"] <= 1.0
    for _ in range(20):
        clock[0] += 0.5
        heard = ears.hear({0: {"time": 1.0}})
    assert heard[0]["quiet_s"] == pytest.approx(10.0, abs=1.01)
    assert ears.hear({0: {"time": 2.0}})[0]["quiet_s"] == 0.0


def test_a_request_is_served_once_and_only_in_its_attempt(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.prepare()
    run_dir.request(1, 0, "end", "hung at a.py:3")
    assert run_dir.take_request(1, 1) is None
    assert run_dir.take_request(1, 0) == "end"
    assert run_dir.take_request(1, 0) is None
    assert run_dir.end_reason(1, 0) == "hung at a.py:3"
    assert run_dir.end_reason(1, 1) == ""


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        # the killed one, though its peers' tracebacks are older
        (
            [
                Failure(0, 1, 5.0, "RuntimeError: Connection closed by peer"),
                Failure(1, -signal.SIGKILL, 6.0),
            ],
            1,
        ),
        # the one with its own error, not the one that lost its peer, nor those the agent ended
        (
            [
                Failure(0, 1, 5.0, "RuntimeError: Connection closed by peer"),
                Failure(1, 1, 6.0, "ValueError: bad batch"),
                Failure(2, -signal.SIGTERM, 1.0),
            ],
            1,
        ),
        # of two with errors of their own, the earlier
        ([Failure(0, 1, 5.0, "ValueError"), Failure(1, 7, 4.0)], 1),
        # ended by SIGTERM from outside: seen dead before any other was ended
        ([Failure(0, -15, 6.0, first_seen=True), Failure(1, 1, 5.0, "closed by peer")], 0),
    ],
)
def test_the_cause_is_blamed_and_not_its_echo(failures, first):
    assert min(failures, key=lambda failure: failure.blame).rank == first


FAULTY = """
    from seqpar.launch.context import current_run
    run = current_run()
    for step in range(9):
        if run.attempt == 0 and step == 2 and rank == 1:
            print("fault at", time.time(), flush=True)
            time.sleep(600)
        dist.all_reduce(total)
        print("attempt", run.attempt, "step", step, "at", time.time(), flush=True)
        run.report(step=step, loss=1.0, group=[0, 1], documents=[4, 5])
        time.sleep(0.1)
"""


def times(text: str, mark: str) -> float:
    return float(next(line for line in text.splitlines() if mark in line).split()[-1])


def test_a_hung_rank_is_found_within_the_bound_and_the_job_goes_on(seqpar, write_script, tmp_path):
    script = write_script(FAULTY)
    options = ("--nproc", 2, "--set", "restarts=1", "--set", "hang_timeout_s=3")
    outcome = seqpar("launch", *options, script)
    assert outcome.returncode == 0, outcome.stderr
    run = RunDir(tmp_path / "runs" / "train")
    logs = run.log(0).read_text(), run.log(1).read_text()
    assert "attempt 1 step 8" in logs[0]
    hung = times(logs[1], "fault at")
    assert times(logs[0], "attempt 1 step 0") - hung < 3.0 + 5.0 + 6.0
    assert [event["attempt"] for event in run.events() if event["event"] == "started"] == [0, 1]
    (hang,) = [event for event in run.events() if event["event"] == "hang"]
    assert hang["missing"] == [1]
    assert 1.5 < hang["time"] - hung < 3.0 + 5.0
    assert f"hung at {script}" in hang["reason"]
    assert f'File "{script}"' in hang["stacks"]["1"]  # where the missing rank is
    assert "all_reduce" in hang["stacks"]["0"]


def test_a_hang_without_restarts_ends_the_job_with_the_missing_ranks_name(seqpar, write_script):
    script = write_script("if rank == 0: time.sleep(600)\ndist.all_reduce(total)\n")
    outcome = seqpar("launch", "--nproc", 2, "--set", "hang_timeout_s=2", script)
    assert outcome.returncode == 137
    assert f"rank 0 hung at {script}" in outcome.stderr


def test_a_failed_rank_is_told_in_sequence_parallel_terms(seqpar, write_script):
    script = write_script(
        """
        from seqpar.launch.context import current_run
        current_run().report(step=7, micro_batch=2, group=[0, 1], documents=[31, 32])
        if rank == 1: raise ValueError("bad document")
        dist.all_reduce(total)
        """
    )
    outcome = seqpar("launch", "--nproc", 2, script)
    lines = outcome.stderr.strip().splitlines()
    assert "ValueError: bad document" in lines[-1]
    assert "at step 7, micro-batch 2, group [0, 1], documents [31, 32]" in lines[-1]


def test_a_job_over_its_time_is_stopped(seqpar, write_script):
    script = write_script("time.sleep(600)\n")
    started = time.monotonic()
    outcome = seqpar("launch", "--nproc", 2, "--set", "timeout_s=4", script)
    assert outcome.returncode == 124
    assert "it ran for its timeout_s of 4" in outcome.stderr
    assert time.monotonic() - started < 4 + 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_takes_its_ranks_along(write_script, tmp_path, number):
    script = write_script("print('up', os.getpid(), flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "seqpar.cli", "launch", "--nproc", "2", str(script)]
    launcher = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ends = threading.Timer(60, launcher.kill)
    ends.start()
    run = RunDir(tmp_path / "runs" / "train")
    while launcher.poll() is None and not all(
        run.log(rank).exists() and "up" in run.log(rank).read_text() for rank in range(2)
    ):
        time.sleep(0.1)
    pids = [json.loads(path.read_text())["pid"] for path in run.ranks.glob("*.alive")]
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    ends.cancel()
    assert launcher.returncode == (143 if number == signal.SIGTERM else -9)
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


POSTED = """
    from seqpar.launch.context import current_run
    if rank == 1: time.sleep(600)
    work = dist.all_reduce(total, async_op=True)
    work.wait()
"""


def test_a_rank_that_waits_for_a_collective_posted_before_is_seen_to_wait(seqpar, write_script):
    started = time.monotonic()
    outcome = seqpar("launch", "--nproc", 2, "--set", "hang_timeout_s=2", write_script(POSTED))
    assert outcome.returncode == 137
    assert "rank 1 hung at" in outcome.stderr
    assert "in <module>: work.wait()" in outcome.stderr
    assert time.monotonic() - started < 2 + 5 + 6
