"""The Ray engine: Ray Train places, watches and restarts the ranks.

With no address an embedded Ray is started on this machine, without dashboard and with a token;
with one, the job joins that cluster. What is ours: each rank is a child process of its Ray worker
(`seqpar.launch.ray_worker`), and the first failure is told in the same words as by the local
engine. The trainer is the one that TorchTrainer derives from: what TorchTrainer adds is a torch
process group in Ray's own processes, and with it the import of torch in each of them.

`seqpar.launch.security.enable_token_auth` must have been called before this module is imported:
Ray reads its authentication mode at import.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from seqpar.errors import LaunchError, MissingExtraError
from seqpar.launch.failure import Failure
from seqpar.launch.placement import Placement
from seqpar.launch.rundir import RunDir
from seqpar.launch.stopping import StoppedError, stop_error, stopped_by_signals
from seqpar.launch.supervise import Supervisor

try:
    import ray
    import ray.train
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from seqpar.launch.ray_cluster import ray_connection, shipped_script, ships
    from seqpar.launch.ray_geometry import GeometryPolicy, NodeLossPolicy, RankConfig
    from seqpar.launch.ray_worker import RankEndedError, run_rank
except ImportError as error:
    raise MissingExtraError("ray", "ray", "the ray engine") from error

__all__ = ["run_ray"]


class GeometryTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer with our policies for scaling and failure, and fewer helpers."""

    def __init__(self, *arguments: Any, placement: Placement, **options: Any) -> None:
        super().__init__(*arguments, backend_config=RankConfig(), **options)
        self.spec = placement.spec
        self.run_dir = placement.run_dir
        # Ray reserves a run's resources for 180 s, a killed driver's too: under one name the same
        # run takes them over when it is resumed. The context is frozen and makes its own name.
        object.__setattr__(self.train_run_context, "run_id", placement.run_id)

    def _create_default_callbacks(self) -> list[Any]:
        """Without Ray's actors for data sets, which a script of ours has not; and on an embedded
        Ray, which ends with its launcher, without the one that cleans up after a lost driver."""
        unused: tuple[type, ...] = (DatasetsCallback,)
        if self.spec.address is None:
            unused += (PlacementGroupCleanerCallback,)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = GeometryPolicy(self.scaling_config, self.spec)
        parts["failure_policy"] = NodeLossPolicy(self.run_config.failure_config, self.run_dir)
        return super()._initialize_and_run_controller(**parts)


def run_ray(placement: Placement) -> None:
    """Run the job on Ray and return when its script has succeeded on every rank.

    Raises:
        RankFailedError: a rank died and no restart is left; carries its rank and exit code.
        LaunchError: the cluster cannot be reached, or cannot hold the ranks, or was lost; or the
            launcher was told to stop, or the job's time was up.
    """
    run_dir = RunDir(placement.run_dir)
    supervisor = Supervisor(placement, run_dir, holds_ranks=False)
    try:
        with ray_connection(placement), FollowLog(run_dir.log(0)), stopped_by_signals(), supervisor:
            fit(trainer(placement))
    except ray.train.TrainingFailedError as error:
        raise explain(error, placement, run_dir) from None
    except StoppedError as error:
        raise stop_error(placement, error.number, out_of_time=supervisor.out_of_time) from None


def fit(job: GeometryTrainer) -> None:
    """Run `job.fit()` in a thread: Ray would take the main thread's signals and end with code 0."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            job.fit()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="seqpar-ray-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if outcome:
        raise outcome[0]


def trainer(placement: Placement) -> GeometryTrainer:
    """Ray Train's trainer for the job; on a cluster, one that shrinks to what the job allows."""
    spec = placement.spec
    resources = {"CPU": spec.resources.cpus_per_rank}
    if spec.resources.memory_bytes_per_rank:
        resources["memory"] = float(spec.resources.memory_bytes_per_rank)
    if placement.device == "cuda":
        resources["GPU"] = 1.0
    shrinks = spec.address is not None and spec.can_shrink
    return GeometryTrainer(
        run_rank,
        placement=placement,
        train_loop_config={
            "script": shipped_script(spec),
            "environment": placement.environment(),
            "run_dir": str(placement.run_dir),
            "cwd": None if ships(spec) else str((spec.working_dir or Path.cwd()).absolute()),
            "restarts": spec.restarts,
            "port": spec.port or 0,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=(spec.smallest_allowed(), placement.num_ranks)
            if shrinks
            else placement.num_ranks,
            use_gpu=placement.device == "cuda",
            resources_per_worker=resources,
            placement_strategy=spec.resources.placement,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(placement.run_dir),
            failure_config=ray.train.FailureConfig(max_failures=spec.restarts),
        ),
    )


def explain(error: Any, placement: Placement, run_dir: RunDir) -> LaunchError:
    """Ray Train's error as ours: the first rank that failed, or what Ray says if none did."""
    found = [_failure(rank, cause) for rank, cause in getattr(error, "worker_failures", {}).items()]
    known = [failure for failure in found if failure is not None]
    if not known:
        text = " ".join(str(error).split())
        return LaunchError(f"job {placement.spec.name}: Ray ended it: {text[:500]}")
    first = min(known, key=lambda failure: failure.blame)
    return first.error(placement, run_dir)


def _failure(rank: int, cause: Any) -> Failure | None:
    inner = getattr(cause, "cause", None) or cause
    for candidate in (cause, inner, cause.__cause__):
        if isinstance(candidate, RankEndedError):
            return Failure(
                candidate.rank,
                candidate.exit_code,
                candidate.ended,
                candidate.trace,
                candidate.reason,
            )
    if isinstance(cause, ray.exceptions.RayActorError):
        return Failure(rank, -signal.SIGKILL, 0.0, reason="lost its Ray worker")
    return None


class FollowLog:
    """Copies a growing log to standard output while the context is open."""

    def __init__(self, path: Path, interval_s: float = 0.2) -> None:
        self.path = path
        self.interval_s = interval_s
        self.position = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="seqpar-follow", daemon=True)

    def __enter__(self) -> FollowLog:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._copy()

    def _follow(self) -> None:
        while not self.ended.wait(self.interval_s):
            self._copy()

    def _copy(self) -> None:
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as log:
            log.seek(self.position)
            data = log.read()
            self.position += len(data)
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
