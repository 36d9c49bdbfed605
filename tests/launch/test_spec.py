"""The job file: what is accepted, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqpar.errors import JobSpecError
from seqpar.launch.placement import place
from seqpar.launch.spec import JobSpec, load_job


@pytest.fixture
def job(tmp_path: Path):
    (tmp_path / "train.py").write_text("print('hello')\n")

    def write(text: str) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return write


def test_a_job_file_is_read_with_its_defaults(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = load_job(job("script: train.py\nnproc: 4\nargs: [--steps, 10, --flag, true]\n"))
    assert (spec.name, spec.nproc, spec.engine) == ("small", 4, "local")
    assert spec.script == tmp_path / "train.py"
    assert spec.args == ("--steps", "10", "--flag", "true")
    assert spec.run_folder() == tmp_path / "runs" / "small"
    assert spec.checkpoint_folder() == tmp_path / "runs" / "small" / "checkpoints"


def test_overrides_win_and_reach_inside(job):
    path = job("script: train.py\nnproc: 4\nenv: {A: 1}\n")
    spec = load_job(path, ["nproc=2", "env.B=two", "resources.placement=SPREAD", "args=[x, 3]"])
    assert (spec.nproc, spec.env, spec.args) == (2, {"A": "1", "B": "two"}, ("x", "3"))
    assert spec.resources.placement == "SPREAD"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("script: train.py\nnprocs: 4\n", "unknown key nprocs; did you mean nproc?"),
        ("script: train.py\nxyzzy: 4\n", "unknown key xyzzy; known: name, script"),
        ("script: train.py\nresources: {cpu_per_rank: 1}\n", "did you mean cpus_per_rank?"),
        ("script: gone.py\n", "gone.py is not there"),
        ("script: train.py\nnproc: 0\n", "nproc = 0: Input should be greater than or equal to 1"),
        ("script: train.py\nnproc: four\n", "nproc = 'four'"),
        ("script: train.py\nengine: slurm\n", "engine = 'slurm': Input should be 'local' or 'ray'"),
        ("script: train.py\ndevices: tpu\n", "devices = 'tpu'"),
        ("script: train.py\nnproc: 3\ndegrees: [1, 2, 4]\n", "2 would fit"),
        ("script: train.py\nnproc: 6\nsp: 4\n", "nproc 6 is not dp any x sp 4"),
        ("script: train.py\nnproc: 4\nsp: 2\ndp: 3\n", "set nproc to 6"),
        ("script: train.py\nname: a/b\n", "cannot name a folder"),
        ("script: train.py\nrestarts: -1\n", "restarts = -1"),
        ("script: train.py\ntimeout_s: 0\n", "timeout_s = 0"),
        ("script: train.py\naddress: head:6379\n", "is for the ray engine: set engine to ray"),
        ("script: train.py\nengine: ray\naddress: http://head:8265\n", "give it to --address"),
        ("script: train.py\nmin_nproc: 2\n", "min_nproc 2 is over nproc 1"),
        ("script: train.py\nmodule: a.b\n", "either script or module"),
        ("nproc: 1\n", "either script or module"),
        ("script: train.py\nworking_dir: nowhere\n", "working_dir nowhere is no folder"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1\n", "is not YAML"),
        ("script: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_a_wrong_field_is_refused_in_words(job, text, words):
    with pytest.raises(JobSpecError) as caught:
        load_job(job(text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_wrong_field_is_told_at_once(job):
    with pytest.raises(JobSpecError, match=r"nprok.*devices = 'tpu'|devices = 'tpu'.*nprok"):
        load_job(job("script: train.py\nnprok: 4\ndevices: tpu\n"))


@pytest.mark.parametrize("override", ["nproc", "=4", "env.A.B=1"])
def test_an_override_that_is_none_is_refused(job, override):
    with pytest.raises(JobSpecError, match="--set"):
        load_job(job("script: train.py\nenv: {A: x}\n"), [override])


def test_a_missing_job_file_is_refused(tmp_path):
    with pytest.raises(JobSpecError, match="no job file at"):
        load_job(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("fields", "found", "ranks", "device"),
    [
        ({"nproc": 4}, 0, 4, "cpu"),
        ({"nproc": 4, "devices": "cpu"}, 8, 4, "cpu"),
        ({"nproc": 4, "nproc_on_cuda": "auto", "degrees": (1, 2, 4)}, 1, 1, "cuda"),
        ({"nproc": 4, "nproc_on_cuda": "auto", "degrees": (1, 2, 4)}, 2, 2, "cuda"),
        ({"nproc": 4, "nproc_on_cuda": "auto", "degrees": (1, 2, 4)}, 3, 2, "cuda"),
        ({"nproc": 4, "nproc_on_cuda": "auto"}, 3, 3, "cuda"),
        ({"nproc": 4, "nproc_on_cuda": "auto"}, 8, 4, "cuda"),
        ({"nproc": 4, "nproc_on_cuda": 2}, 8, 2, "cuda"),
        ({"nproc": 4, "allow_oversubscribe": True}, 1, 4, "cuda"),
        ({"nproc": 6, "sp": 2, "nproc_on_cuda": "auto"}, 5, 4, "cuda"),
    ],
)
def test_ranks_follow_the_devices_where_the_file_lets_them(fields, found, ranks, device):
    spec = JobSpec(name="job", module="this", **fields)
    placement = place(spec, num_cuda=found)
    assert (placement.num_ranks, placement.device) == (ranks, device)


@pytest.mark.parametrize(
    ("fields", "found", "words"),
    [
        ({"nproc": 4}, 2, "4 ranks on 2 CUDA devices"),
        ({"nproc": 4, "nproc_on_cuda": 3}, 2, "3 ranks on 2 CUDA devices"),
        ({"nproc": 4, "devices": "cuda"}, 0, "has no CUDA device"),
        ({"nproc": 4, "nproc_on_cuda": "auto", "sp": 4}, 2, "allow 0 ranks"),
        ({"nproc": 4, "nproc_on_cuda": "auto", "min_nproc": 4}, 2, "min_nproc is 4"),
        ({"nproc": 4, "nproc_on_cuda": 3, "degrees": (1, 2, 4)}, 8, "2 would fit"),
    ],
)
def test_more_ranks_than_devices_is_refused_unless_said(fields, found, words):
    with pytest.raises(JobSpecError) as caught:
        place(JobSpec(name="job", module="this", **fields), num_cuda=found)
    assert words in str(caught.value)


def test_a_placement_tells_the_ranks_their_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    spec = JobSpec(name="job", module="this", nproc=2, env={"OMP_NUM_THREADS": "3", "A": "b"})
    environment = place(spec, num_cuda=0).environment()
    assert environment["SEQPAR_RUN_DIR"] == str(tmp_path / "runs" / "job")
    assert (environment["OMP_NUM_THREADS"], environment["A"]) == ("3", "b")
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
