"""The Ray engine, on an embedded Ray and on a cluster of two hosts that loses one."""

from __future__ import annotations

import json

import pytest

from tests.launch.faults import Job, check_history
from tests.launch.hosts import ray_hosts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

pytest.importorskip("ray")


def test_an_embedded_ray_runs_the_script_and_keeps_its_exit_code_and_logs(
    seqpar, write_script, tmp_path
):
    script = write_script(
        """
        print("rank", rank, "of", world, "sum", int(total.item()), sys.argv[1:])
        from seqpar.launch.context import current_run
        current_run().report(step=3, group=[0, 1])
        assert "ray" not in sys.modules
        dist.barrier()
        if rank == 1: sys.exit(7)
        dist.all_reduce(total)
        """
    )
    outcome = seqpar("launch", "--engine", "ray", "--nproc", 2, script, "--", "-x", timeout_s=120)
    assert outcome.returncode == 7, outcome.stderr
    assert "rank 0 of 2 sum 2 ['-x']" in outcome.stdout
    assert "rank 1 exited with code 7, of 2 ranks, at step 3, group [0, 1]" in outcome.stderr
    run = tmp_path / "runs" / "train"
    assert "rank 1 of 2 sum 2" in (run / "logs" / "rank-1.log").read_text()
    state = json.loads((run / "run.json").read_text())
    assert (state["engine"], state["state"], state["failed_rank"]) == ("ray", "failed", 1)


def test_a_cluster_that_loses_a_rank_and_then_a_host_trains_the_same(tmp_path):
    reference = Job(tmp_path / "reference", "local", ranks=2, steps=40)
    reference.folder.mkdir()
    reference.start()
    with ray_hosts(2, cpus=2) as cluster:
        options = ["restarts=1", "degrees=[1,2,4]", f"address={cluster.address}"]
        job = Job(
            tmp_path,
            "ray",
            ranks=4,
            steps=40,
            options=tuple(word for option in options for word in ("--set", option)),
            prefix=cluster.hosts[0].prefix,
            environment={"RAY_AUTH_TOKEN_PATH": cluster.environment["RAY_AUTH_TOKEN_PATH"]},
        )
        job.start()
        job.wait_for_step(0, timeout_s=100)
        killed = job.suffer("kill a rank", 8, timeout_s=60)
        assert killed.recovery_s < 15 * 2
        job.wait_for_step(18)
        lost = job.lose(lambda: cluster.kill(1), "kill a raylet", 18, timeout_s=90)
        assert lost.recovery_s < 30 * 2
        assert job.end() == 0
    assert reference.end() == 0
    worlds = {step["attempt"]: step["world"] for step in job.steps_done()}
    assert worlds == {0: 4, 1: 4, 2: 2}
    check_history(job.steps_done(), reference.steps_done(), tolerance=1e-4)
    assert job.processes() == []
    failed = [event for event in job.run.events() if event["event"] == "failed"]
    assert [bool(event["lost_nodes_of_ranks"]) for event in failed] == [False, True]
