"""Faults on a real training, local engine: it resumes in time, and its history is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.faults import FAULTS, check_history, suffer
from tests.launch.job import Job
from tests.launch.volume import Volume, small_volume

HANG_S = 2.0
RECOVERY_S = dict.fromkeys(FAULTS, 6.0) | dict.fromkeys(
    ("stop a rank", "hang a rank"), HANG_S + 5.0 + 6.0
)
"""Promised: training again within 6 s, and a hang found within its bound and 5 s before that."""

SLACK = 2.0
"""Other work on the machine may take half of it."""

STEPS = 5 + 8 * len(FAULTS)


@pytest.fixture(scope="module")
def unfaulted(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("unfaulted"), "local", ranks=2, steps=STEPS)
    job.start()
    assert job.end() == 0
    return job.steps_done()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume | None]:
    with small_volume(tmp_path / "volume") as mounted:
        yield mounted


def test_faults_one_after_another_change_nothing(tmp_path: Path, unfaulted, volume):
    settings = {"restarts": len(FAULTS), "hang_timeout_s": HANG_S}
    job = Job(tmp_path, "local", 2, STEPS, settings=settings, volume=volume)
    job.start()
    for number, fault in enumerate(FAULTS):
        victim = 0.99 if number % 2 else 0.0
        recovery = suffer(job, fault, 6 + 7 * number, victim=victim)
        assert recovery.recovery_s < RECOVERY_S[fault] * SLACK, recovery
    assert job.end() == 0
    assert len({step["pid"] for step in job.steps_done()}) == 1 + len(FAULTS)
    check_history(job.steps_done(), unfaulted)
    job.check_nothing_left(ended=True)


FILLING = """
    from pathlib import Path
    from seqpar.launch.context import current_run
    run = current_run()
    run.report(step=0)
    time.sleep(1.5)
    try:
        if rank == 0: (run.run_dir / "ballast").write_bytes(bytes(1 << 24))
    except OSError as error:
        assert error.errno == 28
    dist.barrier()
    for step in range(1, 5):
        if rank == 0: print("step", step, "on a full disk")
        run.report(step=step)
        time.sleep(1)
        dist.barrier()
    if rank == 0: (run.run_dir / "ballast").unlink()
"""


def test_a_full_run_folder_neither_ends_nor_hangs_the_job(seqpar, write_script, tmp_path, volume):
    if volume is None:
        pytest.skip("mounting a volume is not permitted here")
    options = ("--set", "hang_timeout_s=2", "--set", f"run_dir={volume.folder / 'run'}")
    outcome = seqpar("launch", "--nproc", 2, *options, write_script(FILLING))
    assert outcome.returncode == 0, outcome.stderr
    assert "step 4 on a full disk" in outcome.stdout


def test_a_run_folder_that_cannot_be_written_is_refused_in_words(seqpar, write_script, volume):
    if volume is None:
        pytest.skip("mounting a volume is not permitted here")
    volume.fill()
    options = ("--set", f"run_dir={volume.folder / 'run'}")
    outcome = seqpar("launch", "--nproc", 1, *options, write_script(""))
    assert outcome.returncode == 1
    assert "cannot be written (No space left on device): free space" in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
