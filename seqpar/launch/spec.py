"""The job file: one YAML for a laptop and for a cluster.

`load_job` reads it with the safe loader, applies `--set key=value` overrides, and refuses every
unknown key (with the nearest known one) and every wrong value in one `JobSpecError` that lists
them all. Nothing is started here and no heavy package is imported.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seqpar.errors import JobSpecError

__all__ = ["JobSpec", "Resources", "load_job", "parse_override", "script_job"]

PositiveSeconds = Annotated[float, Field(gt=0)]


class Resources(BaseModel):
    """What one rank asks of a Ray cluster, and how ranks are placed on nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus_per_rank: Annotated[float, Field(gt=0)] = 1.0
    memory_bytes_per_rank: Annotated[int, Field(ge=0)] = 0
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class JobSpec(BaseModel):
    """A job, as its file says it. Frozen; units end the names.

    Ranks: `nproc` is the number of ranks on CPU, and the most that CUDA devices are used for.
    With `nproc_on_cuda: auto`, a machine with CUDA devices runs the largest allowed number of
    ranks up to `nproc` that its devices give; a number there is insisted on. `degrees` are the
    sizes of sequence-parallel groups that the script may form: a number of ranks is allowed if
    every degree not above it divides it (1, 2, 4: never 3 ranks), or if it is a multiple of `sp`
    where `sp` is given.

    `port` is where the ranks meet; without it a free one is taken and held from the start, which
    cannot collide. Give one only where a firewall asks for it.

    Paths: `script` is relative to the job file; `run_dir` and `working_dir` to the folder that the
    launcher runs in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    script: Path | None = None
    module: str | None = None
    args: tuple[str, ...] = ()
    nproc: Annotated[int, Field(ge=1)] = 1
    nproc_on_cuda: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    degrees: tuple[Annotated[int, Field(ge=1)], ...] = ()
    dp: Annotated[int, Field(ge=1)] | None = None
    sp: Annotated[int, Field(ge=1)] | None = None
    min_nproc: Annotated[int, Field(ge=1)] = 1
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    devices: Literal["auto", "cpu", "cuda"] = "auto"
    allow_oversubscribe: bool = False
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    resources: Resources = Resources()
    env: dict[str, str] = {}
    working_dir: Path | None = None
    run_dir: Path | None = None
    checkpoint_dir: Path | None = None
    tensorboard: bool = False
    restarts: Annotated[int, Field(ge=0)] = 0
    timeout_s: PositiveSeconds | None = None
    start_timeout_s: PositiveSeconds = 120.0
    hang_timeout_s: PositiveSeconds = 600.0
    stop_grace_s: PositiveSeconds = 5.0

    @model_validator(mode="after")
    def _check_together(self) -> JobSpec:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", self.name):
            raise ValueError(
                f"name {self.name!r} cannot name a folder: use at most 63 letters, digits, '_', "
                "'.' or '-', the first a letter or digit"
            )
        if (self.script is None) == (self.module is None):
            raise ValueError("give either script or module: one of them, not both")
        if fault := self._fault_of_address():
            raise ValueError(fault)
        if self.sp is not None and self.nproc != self.sp * (self.dp or self.nproc // self.sp):
            raise ValueError(
                f"nproc {self.nproc} is not dp {self.dp or 'any'} x sp {self.sp}: "
                f"set nproc to {self.sp * (self.dp or 1)}, or change dp or sp"
            )
        if not self.allows(self.nproc):
            raise ValueError(
                f"nproc {self.nproc} does not fit the degrees {list(self.degrees)}: every degree "
                f"up to nproc must divide it; {self.largest_allowed(self.nproc)} would fit"
            )
        if self.min_nproc > self.nproc:
            raise ValueError(f"min_nproc {self.min_nproc} is over nproc {self.nproc}")
        return self

    def _fault_of_address(self) -> str | None:
        if self.address is None:
            return None
        if "//" in self.address:
            return (
                f"address {self.address} is a dashboard's: give it to --address to submit the job, "
                "or set address to where Ray itself listens, as head:6379"
            )
        if self.engine != "ray":
            return f"address {self.address} is for the ray engine: set engine to ray, or drop it"
        return None

    def allows(self, num_ranks: int) -> bool:
        """Whether the job's geometry can be formed by `num_ranks` ranks."""
        if num_ranks < 1 or (self.sp is not None and num_ranks % self.sp):
            return False
        return all(num_ranks % degree == 0 for degree in self.degrees if degree <= num_ranks)

    def largest_allowed(self, num_ranks: int) -> int:
        """The largest allowed number of ranks up to `num_ranks` and `nproc`; 0 if none is."""
        fitting = (n for n in range(min(num_ranks, self.nproc), 0, -1) if self.allows(n))
        return next(fitting, 0)

    def smallest_allowed(self) -> int:
        """The smallest allowed number of ranks, not below `min_nproc`."""
        return next(n for n in range(self.min_nproc, self.nproc + 1) if self.allows(n))

    @property
    def can_shrink(self) -> bool:
        """Whether the job may go on with fewer ranks: it has said what its groups may be."""
        geometry = bool(self.degrees) or self.sp is not None
        return geometry and self.smallest_allowed() < self.nproc

    def run_folder(self) -> Path:
        """Absolute path of the run's folder; by default runs/<name> under the current one."""
        return (self.run_dir or Path("runs") / self.name).expanduser().absolute()

    def checkpoint_folder(self) -> Path:
        """Absolute path of the checkpoint folder; by default checkpoints/ in the run's folder."""
        folder = self.checkpoint_dir
        return folder.expanduser().absolute() if folder else self.run_folder() / "checkpoints"

    def command(self) -> list[str]:
        """The script or module and its arguments, as Python takes them."""
        target = [str(self.script)] if self.script else ["-m", str(self.module)]
        return [*target, *self.args]


def load_job(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> JobSpec:
    """Read a job file and apply `key=value` overrides.

    Raises:
        JobSpecError: the file cannot be read, is no mapping, has an unknown key or a wrong value,
            or its script is not there.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise JobSpecError(
            f"no job file at {path}: give the path of a .yaml file, or of a script"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobSpecError(f"cannot read job file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise JobSpecError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise JobSpecError(
            f"{path} holds a {type(content).__name__}: a job file is a mapping of keys to values"
        )
    for override in overrides:
        _assign(content, *parse_override(override))
    content.setdefault("name", path.stem if path.stem != "job" else path.absolute().parent.name)
    return _build(content, base=path.absolute().parent, source=str(path))


def script_job(
    script: Path, args: list[str], options: dict[str, Any], overrides: list[str]
) -> JobSpec:
    """A job for one script, as `seqpar launch --nproc 4 script.py -- args` gives it."""
    content: dict[str, Any] = {"name": script.stem, "script": str(script), "args": args, **options}
    for override in overrides:
        _assign(content, *parse_override(override))
    return _build(content, base=Path.cwd(), source="the command line")


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` as (["a", "b"], value); the value is read as YAML.

    Raises:
        JobSpecError: there is no `=`, or no key before it.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobSpecError(f"--set {text!r} is not key=value, as in --set nproc=2")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip().split("."), value


def _assign(content: dict[str, Any], keys: list[str], value: Any) -> None:
    inner = content
    for key in keys[:-1]:
        below = inner.setdefault(key, {})
        if not isinstance(below, dict):
            raise JobSpecError(f"--set {'.'.join(keys)}: {key} holds a value, not a mapping")
        inner = below
    inner[keys[-1]] = value


def _build(content: dict[str, Any], *, base: Path, source: str) -> JobSpec:
    content = _as_strings(content)
    try:
        spec = JobSpec.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise JobSpecError(f"{source}: " + "; ".join(lines)) from None
    if spec.script is not None:
        script = (base / spec.script.expanduser()).absolute()
        if not script.is_file():
            raise JobSpecError(f"{source}: script {script} is not there; paths are from {base}")
        spec = spec.model_copy(update={"script": script})
    if spec.working_dir is not None and not spec.working_dir.expanduser().is_dir():
        raise JobSpecError(f"{source}: working_dir {spec.working_dir} is no folder")
    return spec


def _as_strings(content: dict[str, Any]) -> dict[str, Any]:
    """Numbers and booleans in `args` and `env` become what YAML showed: text."""
    content = dict(content)
    if isinstance(content.get("args"), list):
        content["args"] = [_text(value) for value in content["args"]]
    if isinstance(content.get("env"), dict):
        content["env"] = {str(key): _text(value) for key, value in content["env"].items()}
    return content


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _explain(problem: Any) -> str:
    """One pydantic problem in a sentence: which key, what is wrong, what to change."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = Resources if problem["loc"][0] == "resources" else JobSpec
        key = str(problem["loc"][-1])
        near = difflib.get_close_matches(key, known.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known.model_fields)
        return f"unknown key {where}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where} = {problem['input']!r}: {message}" if where else message
