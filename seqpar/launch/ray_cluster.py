"""The Ray that a job runs on, embedded or a cluster that it joins, and what travels there."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from seqpar.errors import JobSpecError, LaunchError
from seqpar.launch.placement import Placement
from seqpar.launch.reach import check_answers
from seqpar.launch.spec import JobSpec

__all__ = ["connect", "own_package", "ray_connection", "shipped_script", "ships"]

HEALTH_CHECK_INTERVAL_S = 0.25


def in_ray_job() -> bool:
    """Whether this launcher was itself submitted, as `seqpar launch --address` does."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def ships(spec: JobSpec) -> bool:
    """Whether the working directory travels to the nodes: with the job, or because it is named."""
    return spec.address is not None and (spec.working_dir is not None or in_ray_job())


def shipped_script(spec: JobSpec) -> list[str]:
    """Script and arguments as a node finds them: from the shipped folder, if it was shipped."""
    command = spec.command()
    if ships(spec) and spec.script is not None:
        folder = (spec.working_dir or Path.cwd()).expanduser().absolute()
        if not spec.script.is_relative_to(folder):
            raise JobSpecError(
                f"script {spec.script} is not in working_dir {folder}, which is what travels to "
                "the nodes: move it there, or widen working_dir"
            )
        command[0] = str(spec.script.relative_to(folder))
    return command


def own_package() -> dict[str, Any]:
    """seqpar itself, so that a cluster's nodes run the launcher's version of it."""
    return {"py_modules": [str(Path(__file__).parents[1])]}


def shipment(spec: JobSpec) -> dict[str, Any]:
    """The runtime environment of the job's workers: seqpar itself, and the working directory."""
    if in_ray_job():
        return {}  # it has come with this launcher
    package = own_package()
    if ships(spec):
        package["working_dir"] = str(spec.working_dir)
    return package


def connect(address: str, package: dict[str, Any]) -> None:
    """Connect this process to a cluster; `package` is its runtime environment.

    Raises:
        LaunchError: nothing answers there, or the token is missing or wrong.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit():
        check_answers(host, int(port))
    try:
        ray.init(
            address=address,
            runtime_env=package,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        text = " ".join(str(error).split())[:300]
        raise LaunchError(f"cannot join the cluster at {address}: {text}") from None


def join(spec: JobSpec) -> None:
    """Connect to the cluster of `spec.address` and see that it can hold the job.

    Raises:
        LaunchError: nothing answers there, the token is missing or wrong, or the nodes are fewer
            than the smallest geometry that the job allows.
    """
    address = str(spec.address)
    connect(address, shipment(spec))
    total = ray.cluster_resources().get("CPU", 0.0)
    least = spec.smallest_allowed() if spec.can_shrink else spec.nproc
    needed = least * spec.resources.cpus_per_rank
    if needed > total:
        raise LaunchError(
            f"job {spec.name} needs {needed:g} CPUs for {least} ranks and the cluster at {address} "
            f"has {total:g}: add nodes, or lower nproc or resources.cpus_per_rank"
        )


@contextmanager
def ray_connection(placement: Placement) -> Iterator[None]:
    """A connection to the job's cluster; an embedded one lives as long as the context."""
    spec = placement.spec
    settings = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_INTERVAL_S),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": f"{spec.start_timeout_s:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{spec.start_timeout_s:g}",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a reclaimed node is treated as a lost one
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(settings))
        stack.callback(ray.shutdown)
        if spec.address is None:
            cpus = max(os.cpu_count() or 1, int(spec.resources.cpus_per_rank * placement.num_ranks))
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        else:
            join(spec)
        yield


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: text for name, text in settings.items() if name not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
