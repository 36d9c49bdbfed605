"""What is emitted for KubeRay and Slurm: checked against the fields that those know."""

from __future__ import annotations

import re
import shlex
import subprocess

import jsonschema
import pytest
import yaml

from seqpar.errors import JobSpecError
from seqpar.launch.emit import kuberay_manifest, slurm_script
from seqpar.launch.spec import load_job


def exactly(**properties):
    """An object with these properties and no others, as the Kubernetes API prunes or refuses."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


TEXT, WHOLE = {"type": "string"}, {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
STRINGS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = exactly(
    name=NAME,
    image=TEXT,
    env={"type": "array", "items": exactly(name=TEXT, value=TEXT)},
    resources=exactly(requests=STRINGS, limits=STRINGS),
    volumeMounts={"type": "array", "items": exactly(name=TEXT, mountPath=TEXT)},
)
POD = exactly(
    spec=exactly(
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={
            "type": "array",
            "items": exactly(name=TEXT, persistentVolumeClaim=exactly(claimName=TEXT)),
        },
    )
)
WORKERS = exactly(
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    rayStartParams=STRINGS,
    template=POD,
)
RAY_JOB = exactly(
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=exactly(name=NAME, labels=STRINGS),
    spec=exactly(
        entrypoint=TEXT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        rayClusterSpec=exactly(
            authOptions=exactly(mode={"enum": ["token", "disabled"]}),
            headGroupSpec=exactly(rayStartParams=STRINGS, template=POD),
            workerGroupSpecs={"type": "array", "items": WORKERS},
        ),
    ),
)
"""The part of KubeRay's RayJob definition (ray.io/v1, operator 1.5) that the manifest uses."""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "Big_Job.yaml").write_text(
        "script: train.py\nargs: ['a b', --x, 1]\nnproc: 4\ndegrees: [1, 2, 4]\nrestarts: 2\n"
        "timeout_s: 5400\nenv: {A: 'b c'}\nresources: {memory_bytes_per_rank: 1000}\n"
    )
    return load_job(tmp_path / "Big_Job.yaml")


def options(words: list[str]) -> dict[str, str]:
    """The `--set` overrides among the words of a command."""
    after = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return dict(word.split("=", 1) for word in after)


def test_the_manifest_is_a_ray_job_that_launches_the_job(spec):
    manifest = yaml.safe_load(kuberay_manifest(spec, image="im:1", nodes=2, volume_claim="claim"))
    jsonschema.validate(manifest, RAY_JOB)
    assert manifest["metadata"]["name"] == "big-job"
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_health_check_failure_threshold", "value": "3"} in head["env"]
    assert manifest["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert manifest["spec"]["activeDeadlineSeconds"] == 5400
    folder, _, command = manifest["spec"]["entrypoint"].partition(" && ")
    words = shlex.split(command)
    assert folder == "cd /job"
    assert words[:2] == ["seqpar", "launch"]
    assert words[words.index("train.py") :] == ["train.py", "--", "a b", "--x", "1"]
    found = options(words)
    assert found["nproc"] == "4"
    assert yaml.safe_load(found["env"]) == {"A": "b c"}
    (workers,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["replicas"] == 2
    assert limits == {"cpu": "2", "memory": "2000", "nvidia.com/gpu": "2"}


def test_the_slurm_script_is_one_that_bash_reads_with_known_directives(spec, tmp_path):
    text = slurm_script(spec, nodes=2)
    path = tmp_path / "job.sh"
    path.write_text(text)
    subprocess.run(["bash", "-n", path], check=True)
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert directives == {
        "job-name": "Big_Job",
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "2",
        "gpus-per-node": "2",
        "time": "01:30:00",
        "output": "Big_Job-%j.log",
    }
    assert text.splitlines()[0] == "#!/bin/bash"
    assert "umask 077" in text
    assert "export RAY_health_check_timeout_ms=5000" in text
    words = shlex.split(text.strip().splitlines()[-1])
    assert options(words)["address"] == "$address:$port"
    assert words[-5:] == [str(tmp_path / "train.py"), "--", "a b", "--x", "1"]


def test_the_slurm_script_starts_the_job_on_stand_ins_for_slurm(spec, tmp_path):
    """The script's own logic, run: srun, scontrol, ray and seqpar note how they are called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    bodies = {
        "srun": 'while [[ "$1" == -* ]]; do [[ "$1" == -w ]] && shift; shift; done; exec "$@"',
        "scontrol": "echo head-node; for i in $(seq 20000); do echo node-$i; done",
        "hostname": "echo 10.0.0.7",
        "ray": f'(echo "ray $*"; stat -c %a "$RAY_AUTH_TOKEN_PATH") >> {tmp_path}/calls',
        "seqpar": f'printf "%s\\n" seqpar "$@" > {tmp_path}/launched',
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    path = tmp_path / "job.sh"
    path.write_text(slurm_script(spec, nodes=2))
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    subprocess.run(["bash", path], env=environment, check=True, timeout=20)
    launched = (tmp_path / "launched").read_text().splitlines()
    assert options(launched)["address"] == "10.0.0.7:22345"
    calls = (tmp_path / "calls").read_text()
    assert "ray start --head --port=22345 --node-ip-address=10.0.0.7" in calls
    assert "600" in calls
    assert not list(tmp_path.glob(".seqpar-token*")), "the token goes with the job"


@pytest.mark.parametrize("nodes", [0, 3])
def test_ranks_that_do_not_divide_over_the_nodes_are_refused(spec, nodes):
    with pytest.raises(JobSpecError, match=f"4 ranks do not divide over {nodes} nodes"):
        slurm_script(spec, nodes=nodes)


def test_a_script_outside_the_mounted_folder_is_refused(spec, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(JobSpecError, match="set working_dir to a folder that holds it"):
        kuberay_manifest(spec, image="im:1", nodes=2, volume_claim="claim")
