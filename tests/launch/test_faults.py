"""Faults on a real training, local engine: it resumes in time, and its history is the same."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest

from tests.launch.faults import Job, check_history

RECOVERY_S = {
    "kill a rank": 6.0,
    "tear the last checkpoint": 6.0,
    "fill the disk": 6.0,
    "stop a rank": 2.0 + 5.0 + 6.0,
}
"""Promised: found within the hang bound (2 s here) and 5 s, training again within 6 s."""

SLACK = 2.0
"""Other work on the machine may take half of it."""


@pytest.fixture(scope="module")
def unfaulted(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("unfaulted"), "local", ranks=2, steps=44)
    job.start()
    assert job.end() == 0
    return job.steps_done()


def test_faults_one_after_another_change_nothing(tmp_path: Path, unfaulted):
    options = ("--set", "restarts=4", "--set", "hang_timeout_s=2")
    job = Job(tmp_path, "local", ranks=2, steps=44, options=options)
    job.start()
    for fault, step in zip(RECOVERY_S, (6, 13, 22, 31), strict=True):
        recovery = job.suffer(fault, step)
        assert recovery.recovery_s < RECOVERY_S[fault] * SLACK, recovery
    assert job.end() == 0
    assert {step["attempt"] for step in job.steps_done()} == {0, 1, 2, 3, 4}
    check_history(job.steps_done(), unfaulted)
    assert job.processes() == []


def test_a_killed_launcher_is_resumed_where_it_was(tmp_path: Path, unfaulted):
    job = Job(tmp_path, "local", ranks=2, steps=44)
    job.start()
    job.wait_for_step(10)
    assert job.process is not None
    job.process.send_signal(signal.SIGKILL)
    job.process.wait()
    job.start(resume=True)
    assert job.end() == 0
    done = job.steps_done()
    first_again = [b["step"] for a, b in pairwise(done) if b["step"] <= a["step"]]
    assert len(first_again) == 1, "the second launch goes on from a checkpoint"
    assert first_again[0] >= 4
    for attempt, step in enumerate(done):
        step["attempt"] = attempt  # each launch counts from 0
    check_history(done, unfaulted)
    assert job.processes() == []
