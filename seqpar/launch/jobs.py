"""Running a placed job from start to end, whichever engine carries it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from seqpar.errors import JobSpecError, LaunchError, RankFailedError
from seqpar.launch.placement import Placement
from seqpar.launch.rundir import RunDir
from seqpar.launch.security import enable_token_auth, is_loopback, require_token

__all__ = ["run_job"]


def run_job(placement: Placement, *, resume: bool = False) -> dict[str, Any]:
    """Run the job on its engine; the outcome as run.json holds it.

    `resume` keeps the run id of the folder's last run, so that its checkpoints are found.

    Raises:
        RankFailedError: a rank died and no restart is left.
        LaunchError: the job could not be started, was stopped, or its time was up.
    """
    run_dir = RunDir(placement.run_dir)
    if resume:
        placement = replace(placement, run_id=_run_id(run_dir, placement), resume=True)
    started = time.time()
    _begin(run_dir, placement, started)
    try:
        _engine(placement)(placement)
    except LaunchError as error:
        _end(run_dir, started, "failed", getattr(error, "exit_code", 1), error)
        raise
    except BaseException as error:
        _end(run_dir, started, "failed", 1, error)
        raise
    _end(run_dir, started, "succeeded", 0, None)
    return run_dir.state()


def _begin(run_dir: RunDir, placement: Placement, started: float) -> None:
    """Make the run's folder and say in it that the job runs."""
    try:
        folder = placement.spec.checkpoint_folder()
        folder.mkdir(parents=True, exist_ok=True)
        folder = run_dir.path
        run_dir.prepare()
        run_dir.write_state(
            run_id=placement.run_id,
            name=placement.spec.name,
            engine=placement.spec.engine,
            state="running",
            launcher_pid=os.getpid(),
            ranks=placement.num_ranks,
            device=placement.device,
            started=started,
            exit_code=None,
            error=None,
        )
    except OSError as error:
        raise LaunchError(
            f"{folder} cannot be written ({error.strerror}): free space there, or set run_dir or "
            "checkpoint_dir to another folder"
        ) from None


def _engine(placement: Placement) -> Any:
    if placement.spec.engine == "local":
        from seqpar.launch.local import run_local

        return run_local
    require_cluster_token(placement.spec.address)
    enable_token_auth()
    from seqpar.launch.ray import run_ray

    return run_ray


def require_cluster_token(address: str | None) -> None:
    """Refuse a cluster on other machines for which there is no token; before Ray is imported.

    Raises:
        LaunchError: the address is not this machine's, and no token is there for it.
    """
    if address not in (None, "auto", "local") and not is_loopback(address.rpartition(":")[0]):
        require_token(address)


def _run_id(run_dir: RunDir, placement: Placement) -> str:
    run_id = run_dir.state().get("run_id")
    if not isinstance(run_id, str):
        raise JobSpecError(
            f"--resume: {run_dir.path} holds no earlier run of job {placement.spec.name}; "
            "launch without --resume, or set run_dir to the earlier run's folder"
        )
    return run_id


def _end(
    run_dir: RunDir, started: float, state: str, code: int, error: BaseException | None
) -> None:
    rank = error.global_rank if isinstance(error, RankFailedError) else None
    outcome = {
        "state": state,
        "exit_code": code,
        "wall_s": round(time.time() - started, 3),
        "error": str(error) if error else None,
        "failed_rank": rank,
    }
    run_dir.write_state(**outcome)
    run_dir.record("ended", **outcome)
