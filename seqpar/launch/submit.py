"""Jobs on a running cluster, through Ray Jobs: submit, ask, read, stop.

The cluster's head runs `seqpar launch` as a Ray job, with the working directory and seqpar itself
shipped to it; the exit code that comes back is that of the script. Unless the job file says
otherwise, the run is kept in ~/runs/<name> there: a home that all nodes share.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from seqpar.errors import JobSpecError, LaunchError, MissingExtraError
from seqpar.launch.reach import check_answers
from seqpar.launch.security import enable_token_auth, is_loopback, require_token
from seqpar.launch.spec import JobSpec

__all__ = ["RemoteJobs"]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class RemoteJobs:
    """The jobs of one cluster; `address` is its dashboard's, as http://head:8265.

    Raises:
        JobSpecError: the address is none of a dashboard.
        LaunchError: nothing answers there, or the cluster is not this machine and no token is set.
    """

    def __init__(self, address: str) -> None:
        parts = urlparse(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JobSpecError(f"--address {address!r} is none of a dashboard: http://head:8265")
        if not is_loopback(parts.hostname):
            require_token(address)
        check_answers(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        enable_token_auth()
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise MissingExtraError("ray[default]", "ray", "submitting to a cluster") from error
        with _told_in_words(address):
            self.client = JobSubmissionClient(address)
        self.address = address

    def submit(self, spec: JobSpec) -> str:
        """Start the job on the cluster; its submission id."""
        folder, target = job_folder(spec)
        package = {"working_dir": str(folder), "py_modules": [str(Path(__file__).parents[1])]}
        words = ["python", "-m", "seqpar.cli", "launch", "--engine", "ray", *target]
        with _told_in_words(self.address):
            return str(
                self.client.submit_job(
                    entrypoint=shlex.join(words),
                    runtime_env=package,
                    metadata={"name": spec.name, "launcher": "seqpar"},
                )
            )

    def status(self, job: str) -> dict[str, Any]:
        """State, message and exit code of a job."""
        with _told_in_words(self.address):
            info = self.client.get_job_info(job)
        return {
            "job": job,
            "name": (info.metadata or {}).get("name", ""),
            "state": info.status.value.lower(),
            "exit_code": info.driver_exit_code,
            "message": info.message,
            "started": (info.start_time or 0) / 1000 or None,
            "ended": (info.end_time or 0) / 1000 or None,
        }

    def logs(self, job: str) -> str:
        """All that the job's launcher, and rank 0, have printed so far."""
        with _told_in_words(self.address):
            return str(self.client.get_job_logs(job))

    def stop(self, job: str) -> bool:
        """Ask for the job's end; False if it had ended before."""
        with _told_in_words(self.address):
            return bool(self.client.stop_job(job))

    def follow(self, job: str, *, interval_s: float = 0.5) -> Iterator[str]:
        """What the job prints, as it comes, until it ends."""
        shown = 0
        while True:
            ended = self.status(job)["state"].upper() in ENDED
            text = self.logs(job)
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if ended:
                return
            time.sleep(interval_s)


def job_folder(spec: JobSpec) -> tuple[Path, list[str]]:
    """The folder that travels, and the command line for the job as seen from inside it."""
    if spec.script is None:
        raise JobSpecError("--address needs a script, and the job names a module: wrap it in one")
    folder = (spec.working_dir or spec.script.parent).expanduser().absolute()
    if not spec.script.is_relative_to(folder):
        raise JobSpecError(
            f"script {spec.script} is not in working_dir {folder}, which is what travels to the "
            "cluster: move it there, or widen working_dir"
        )
    kept = {"run_dir": f"~/runs/{spec.name}"} | spec.model_dump(mode="json", exclude_defaults=True)
    for name in ("engine", "working_dir", "script", "args", "address"):
        kept.pop(name, None)
    words = ["--set", "address=auto"]
    for name, value in kept.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
        words += ["--set", f"{name}={text}"]
    return folder, [*words, str(spec.script.relative_to(folder)), "--", *spec.args]


@contextlib.contextmanager
def _told_in_words(address: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, ConnectionError, RayError) as error:
        text = " ".join(str(error).split())[:300]
        raise LaunchError(f"the cluster at {address} refused: {text}") from None
