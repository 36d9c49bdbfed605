"""The Ray engine, on an embedded Ray and on a cluster of two hosts that loses one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqpar.planners.cost import CostModel, LayerCost, Link
from tests.launch.faults import check_history, suffer
from tests.launch.hosts import DASHBOARD, RayHosts, ray_hosts
from tests.launch.job import REPOSITORY, Job

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


@pytest.fixture(scope="module")
def head() -> Iterator[RayHosts]:
    """Two hosts, of which only the first runs Ray yet."""
    with ray_hosts([2, 2], started=1) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(head: RayHosts) -> RayHosts:
    head.start(1)
    return head


def on_head(cluster: RayHosts, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, on the head's host."""
    return subprocess.run(
        [*cluster.hosts[0].prefix, sys.executable, "-m", "seqpar.cli", *arguments],
        cwd=folder,
        env={**cluster.environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_submitted_job_brings_its_output_and_exit_code_back(head, tmp_path):
    # On one host: two raylets on one file system unpack the shipped folder over each other.
    (tmp_path / "train.py").write_text(
        "import sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "print('args', sys.argv[1:], flush=True)\n"
        "dist.barrier()\n"
        "sys.exit(9 if dist.get_rank() == 1 else 0)\n"
    )
    dashboard = f"http://127.0.0.1:{DASHBOARD}"
    options = ("--address", dashboard, "--nproc", "2", "--set", f"run_dir={tmp_path / 'run'}")
    outcome = on_head(head, tmp_path, "launch", *options, "train.py", "--", "q")
    assert outcome.returncode == 9, outcome.stdout + outcome.stderr
    assert "args ['q']" in outcome.stdout
    assert "rank 1 exited with code 9" in outcome.stdout
    job = outcome.stderr.split("submitted ")[1].split(";")[0]
    status = json.loads(on_head(head, tmp_path, "status", job, "--address", dashboard).stdout)
    assert (status["state"], status["exit_code"], status["name"]) == ("failed", 9, "train")
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    texts = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(token in text for text in [outcome.stdout, outcome.stderr, *texts])


def test_doctor_asks_every_node_and_hands_what_it_timed_to_the_planner(cluster, tmp_path):
    old = Link(degree=2, nodes=2, gib_per_s=1e-9)
    near = Link(degree=2, gib_per_s=3.0)
    layers = (LayerCost(kind="all", linear_ms=1.0),)
    model = CostModel(name="here", layers=layers, links=(near, old), memory_bytes_per_token=1.0)
    (tmp_path / "cost.json").write_text(json.dumps(model.to_json()))
    options = ("--cluster", cluster.address, "--cost", "cost.json", "--json")
    outcome = on_head(cluster, tmp_path, "doctor", *options)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = json.loads(outcome.stdout)
    addresses = {host.address for host in cluster.hosts}
    assert {node["address"] for node in found["nodes"]} == addresses
    assert all(node["token_mode"] == "0o600" for node in found["nodes"])
    assert all(node["interface"] for node in found["nodes"])
    (pair,) = found["pairs"]
    assert 0 < pair["latency_ms"] < 1000
    assert pair["bandwidth_bytes_per_s"] > 1e6
    assert [degree for _, degree, _ in found["transfers"]] == [2, 2]
    assert all(ms > 0 for _, _, ms in found["transfers"])
    kept, across = CostModel.load(str(tmp_path / "cost.json")).links
    assert kept == near
    assert (across.degree, across.nodes) == (2, 2)
    assert 1e-3 < across.gib_per_s < 1e3


def test_a_cluster_that_loses_a_rank_and_then_a_host_trains_the_same(cluster, tmp_path):
    reference = Job(tmp_path / "reference", "local", ranks=2, steps=40)
    reference.folder.mkdir()
    reference.start()
    settings = {"restarts": 1, "degrees": [1, 2, 4]}
    step_s = 0.3  # the job is to outlast the cluster's notice of a lost host
    job = Job(tmp_path, "ray", 4, 40, step_s, settings, cluster)
    job.start()
    job.wait_for_step(0, timeout_s=100)
    killed = suffer(job, "kill a rank", 8, timeout_s=90)
    assert killed.recovery_s < 15 * 4  # 15 s promised; other work may take most of the machine
    lost = suffer(job, "kill a raylet", 18, timeout_s=90)
    assert lost.recovery_s < 30 * 2
    assert job.end() == 0
    assert reference.end() == 0
    worlds = {step["attempt"]: step["world"] for step in job.steps_done()}
    assert worlds == {0: 4, 1: 4, 2: 2}
    check_history(job.steps_done(), reference.steps_done(), tolerance=1e-4)
    job.check_nothing_left(ended=True, within_s=20)
    failed = [event for event in job.run.events() if event["event"] == "failed"]
    assert [bool(event["lost_nodes_of_ranks"]) for event in failed] == [False, True]
