"""A job as other schedulers take it: a KubeRay RayJob manifest, and a Slurm batch script.

Both are text to read, keep and submit; nothing is started. The manifest asks for Ray's token
authentication, and takes the token from a Kubernetes secret; the Slurm script keeps it in a file
that only its owner can read.
"""

from __future__ import annotations

import re
import shlex
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from seqpar.errors import JobSpecError
from seqpar.launch.spec import JobSpec

__all__ = ["kuberay_manifest", "slurm_script"]

_LAUNCH = ["seqpar", "launch", "--engine", "ray"]
FOLDER = "/job"
"""Where the working directory is mounted in every pod."""
HEALTH_CHECKS = {"RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "3"}
"""For the head: a host that is cut off is given up within 24 s (3 checks of 5 s, 3 s apart) and not
within Ray's own 65 s."""


def kuberay_manifest(spec: JobSpec, *, image: str, nodes: int, volume_claim: str) -> str:
    """A RayJob (ray.io/v1) that runs `spec` on `nodes` worker pods, as YAML.

    Args:
        image: holds Ray, torch and seqpar.
        nodes: worker pods; each takes the same number of ranks.
        volume_claim: a ReadWriteMany claim with the script, mounted at /job; runs are kept there.

    Raises:
        JobSpecError: the ranks do not divide over the nodes.
    """
    ranks = _ranks_per_node(spec, nodes)
    name = re.sub(r"[^a-z0-9-]+", "-", spec.name.lower()).strip("-")[:47]
    script = [_script_in_pod(spec), "--", *spec.args]
    command = [*_LAUNCH, "--set", "address=auto", *_settings(spec), *script]
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "seqpar"}},
        "spec": {
            "entrypoint": shlex.join(["cd", FOLDER]) + " && " + shlex.join(command),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": spec.restarts,
            "rayClusterSpec": {
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod(
                        spec, image, volume_claim, "ray-head", ranks=0, cpus=2, gpus=0
                    ),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "ranks",
                        "replicas": nodes,
                        "minReplicas": nodes,
                        "maxReplicas": nodes,
                        "rayStartParams": {},
                        "template": _pod(
                            spec,
                            image,
                            volume_claim,
                            "ray-worker",
                            ranks=ranks,
                            cpus=ceil(ranks * spec.resources.cpus_per_rank),
                            gpus=0 if spec.devices == "cpu" else ranks,
                        ),
                    }
                ],
            },
        },
    }
    if spec.timeout_s is not None:
        manifest["spec"]["activeDeadlineSeconds"] = ceil(spec.timeout_s)  # type: ignore[index]
    return yaml.safe_dump(manifest, sort_keys=False)


def slurm_script(spec: JobSpec, *, nodes: int) -> str:
    """A batch script that starts Ray on `nodes` nodes and runs `spec` on them.

    Raises:
        JobSpecError: the ranks do not divide over the nodes.
    """
    ranks = _ranks_per_node(spec, nodes)
    cpus = ceil(ranks * spec.resources.cpus_per_rank)
    command = [*_LAUNCH, *_settings(spec), "--set"]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={spec.name}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={cpus}",
        *([] if spec.devices == "cpu" else [f"#SBATCH --gpus-per-node={ranks}"]),
        *([f"#SBATCH --time={_slurm_time(spec.timeout_s)}"] if spec.timeout_s else []),
        f"#SBATCH --output={spec.name}-%j.log",
        "set -euo pipefail",
        "",
        "# Ray's token: for this job alone, readable by its owner alone, on the shared home.",
        'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.seqpar-token-$SLURM_JOB_ID"',
        "export " + " ".join(f"{name}={value}" for name, value in HEALTH_CHECKS.items()),
        '(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d " \\n" > "$RAY_AUTH_TOKEN_PATH")',
        "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT",
        "",
        # head(1) would close the pipe, which ends the script when there are many nodes.
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        'address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | cut -d " " -f 1)',
        "port=$((20000 + SLURM_JOB_ID % 10000))  # below the ephemeral ports",
        f'ray_options="--num-cpus={cpus} --disable-usage-stats --block"',
        'srun --nodes=1 --ntasks=1 -w "$head" ray start --head --port="$port" '
        '--node-ip-address="$address" --include-dashboard=false $ray_options &',
        "for _ in $(seq 60); do",
        '  ray status --address="$address:$port" > /dev/null 2>&1 && break',
        "  sleep 1",
        "done",
    ]
    if nodes > 1:
        lines += [
            f'srun --nodes={nodes - 1} --ntasks={nodes - 1} --exclude="$head" '
            'ray start --address="$address:$port" $ray_options &',
        ]
    script = shlex.join([str(spec.script), "--", *spec.args])
    lines += ["", f'{shlex.join(command)} address="$address:$port" {script}', ""]
    return "\n".join(lines)


def _ranks_per_node(spec: JobSpec, nodes: int) -> int:
    if nodes < 1 or spec.nproc % nodes:
        raise JobSpecError(
            f"{spec.nproc} ranks do not divide over {nodes} nodes: "
            "change --nodes or nproc so that every node takes the same number"
        )
    if spec.script is None:
        raise JobSpecError("--emit needs a script, and the job names a module: wrap it in a script")
    return spec.nproc // nodes


def _settings(spec: JobSpec) -> list[str]:
    """The job's fields as overrides, so that the text that is emitted stands alone."""
    fields = {"name", "nproc", "degrees", "dp", "sp", "min_nproc", "devices", "restarts", "env"}
    fields |= {"hang_timeout_s", "start_timeout_s", "stop_grace_s"}
    given = spec.model_dump(mode="json", include=fields, exclude_defaults=True)
    words = []
    for name, value in given.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
        words += ["--set", f"{name}={text}"]
    return words


def _script_in_pod(spec: JobSpec) -> str:
    folder = (spec.working_dir or Path.cwd()).expanduser().absolute()
    assert spec.script is not None
    if not spec.script.is_relative_to(folder):
        raise JobSpecError(
            f"script {spec.script} is not in {folder}, whose copy is mounted at {FOLDER} in the "
            "pods: set working_dir to a folder that holds it"
        )
    return str(spec.script.relative_to(folder))


def _pod(
    spec: JobSpec,
    image: str,
    volume_claim: str,
    container: str,
    *,
    ranks: int,
    cpus: int,
    gpus: int,
) -> dict[str, Any]:
    resources: dict[str, str] = {"cpu": str(cpus)}
    if ranks and spec.resources.memory_bytes_per_rank:
        resources["memory"] = str(spec.resources.memory_bytes_per_rank * ranks)
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    claim = {"claimName": volume_claim}
    env = [{"name": name, "value": value} for name, value in HEALTH_CHECKS.items()]
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": image,
                    **({} if ranks else {"env": env}),
                    "resources": {"requests": resources, "limits": dict(resources)},
                    "volumeMounts": [{"name": "job", "mountPath": FOLDER}],
                }
            ],
            "volumes": [{"name": "job", "persistentVolumeClaim": claim}],
        }
    }


def _slurm_time(seconds: float) -> str:
    minutes = ceil(seconds / 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"
