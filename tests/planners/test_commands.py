"""`seqpar plan` and `seqpar simulate`: the JSON schema, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from seqpar.cli import app
from seqpar.errors import InfeasiblePlanError, PlanError
from seqpar.planners import ScatterPlan, ScatterProblem, preset
from seqpar.planners.lengths import read_lengths
from tests.planners.test_plan import FLEXSP, SMALL, lognormal


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def lengths_file(folder: Path, lengths: list[int], kind: str) -> str:
    path = folder / f"lengths.{kind}"
    if kind == "npy":
        np.save(path, np.asarray(lengths))
    else:
        path.write_text(json.dumps(lengths) if kind == "json" else "\n".join(map(str, lengths)))
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "json", "npy"])
def test_plan_prints_the_issues_object(kind: str, tmp_path: Path) -> None:
    lengths = lognormal(7, count=96)
    words = [
        "plan",
        lengths_file(tmp_path, lengths, kind),
        "--devices",
        "64",
        "--cost",
        "flexsp-7b",
    ]
    result = run(*words, "--time-limit-ms", "20", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {
        "makespan_ms",
        "lower_bound_ms",
        "gap",
        "step_lower_bound_ms",
        "solve_ms",
        "baselines",
        "micro_batches",
    } <= data.keys()
    group = data["micro_batches"][0]["groups"][0]
    assert {"ranks", "degree", "strategy", "sequences", "predicted_ms", "tokens"} <= group.keys()
    problem = ScatterProblem(tuple(lengths), FLEXSP, preset("flexsp-7b"))
    ScatterPlan.from_json(data).verify(problem)
    assert data["makespan_ms"] == pytest.approx(
        sum(batch["makespan_ms"] for batch in data["micro_batches"])
    )


def test_plan_as_a_table_with_a_plot_and_polished(tmp_path: Path) -> None:
    path = lengths_file(tmp_path, [9000, 500, 400, 30], "txt")
    words = ["--devices", "8", "--cost", "flexsp-7b", "--exact", "--exact-seconds", "2"]
    result = run("plan", path, *words, "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 0, result.output
    assert "4 sequences on 8 devices" in result.stdout
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_the_exact_programme_and_the_configuration_bound_in_json(tmp_path: Path) -> None:
    path = lengths_file(tmp_path, lognormal(3, count=24), "txt")
    words = ["plan", path, "--devices", "64", "--cost", "flexsp-7b", "--json", "--bound"]
    plain = json.loads(run(*words, "degree").stdout)
    words += ["configuration", "--exact", "--solver", "CBC", "--exact-seconds", "1"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (plain["bound"], data["bound"]) == ("degree", "configuration")
    assert "exact" not in plain
    assert data["makespan_ms"] <= plain["makespan_ms"] * (1 + 1e-9)
    assert data["lower_bound_ms"] <= data["makespan_ms"]
    assert data["gap"] == pytest.approx(data["makespan_ms"] / data["lower_bound_ms"] - 1)
    assert len(data["exact"]) == len(plain["micro_batches"])
    assert sum(check["sequences"] for check in data["exact"]) == 24
    for check in data["exact"]:
        assert check["bound_ms"] > 0
        assert check["gap"] is None or check["gap"] >= 0
        assert check["solve_ms"] < 10_000
    ScatterPlan.from_json(data).verify(
        ScatterProblem(tuple(lognormal(3, count=24)), FLEXSP, preset("flexsp-7b"))
    )


def test_plan_from_a_histogram(tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    path.write_text(json.dumps({"edges_tokens": [1, 1000, 50_000], "counts": [90, 10]}))
    words = ["--devices", "64", "--cost", "flexsp-7b", "--sequences", "64", "--batches", "2"]
    words += ["--time-limit-ms", "10", "--context-tokens", "40000"]
    result = run("plan", "--histogram", str(path), *words, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["devices_needed"] in (8, 16, 32, 64)
    assert data["tokens_per_second"]["mean"] > 0


def test_simulate(tmp_path: Path) -> None:
    path = lengths_file(tmp_path, lognormal(1, count=64), "npy")
    words = ["--cost", "flexsp-7b", "--devices", "8,16", "--batches", "2", "--time-limit-ms", "5"]
    result = run("simulate", path, *words, "--json")
    assert result.exit_code == 0, result.output
    assert [row["devices"] for row in json.loads(result.stdout)["rows"]] == [8, 16]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "has no lengths"),
        ("12\n\nx7\n", "line 3: 'x7' is not a length"),
        ("12\n0\n", "line 2: 0 is below 1"),
        ("[1, 2.5]", "entry 1: 2.5 is not a length"),
        ("[1, NaN]", "entry 1: nan is not a length"),
        ("[1, 1e999]", "entry 1: inf is not a length"),
        ("[1, [2]]", "entry 1: .* is not a length"),
        ("3\n" + "9" * 5000, "line 2: '9{39} is not a length"),
        ('{"a": 1}', "txt must hold a JSON list"),
        ("[1, ", "cannot read lengths"),
        ("[" * 100_000, "cannot read lengths"),
    ],
)
def test_bad_length_files(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    result = run("plan", str(path), "--devices", "8", "--cost", "flexsp-7b")
    assert isinstance(result.exception, PlanError)
    with pytest.raises(PlanError, match=match):
        raise result.exception


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.5])
def test_bad_arrays_of_lengths(bad: float, tmp_path: Path) -> None:
    np.save(tmp_path / "lengths.npy", np.asarray([4.0, bad]))
    with pytest.raises(PlanError, match=r"entry 1: .* is not a length"):
        read_lengths(str(tmp_path / "lengths.npy"))


def test_a_byte_order_mark_is_no_part_of_a_length(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_bytes(b"\xef\xbb\xbf5\r\n6\r\n")
    assert read_lengths(str(tmp_path / "lengths.txt")) == (5, 6)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--devices", "0", "--cost", "flexsp-7b"], "--devices N"),
        (["--devices", "8"], "--cost"),
        (["--devices", "8", "--cost", "nowhere.json"], "there is no cost file nowhere.json"),
        (["--devices", "8", "--cost", "flexsp-7b", "--degrees", "two"], "--degrees takes integers"),
        (["--devices", "8", "--cost", "flexsp-7b", "--bound", "best"], "bound is none"),
        (["--devices", "8", "--cost", "flexsp-7b", "--time-limit-ms", "0"], "time_limit_ms"),
        (["--devices", "8", "--cost", "flexsp-7b", "--time-limit-ms", "inf"], "and finite"),
        (["--devices", "8", "--cost", "flexsp-7b", "--exact", "--solver", "nope"], "no solver"),
        (["--devices", "8", "--cost", "flexsp-7b", "--exact", "--solver", "GUROBI"], "installed"),
    ],
)
def test_bad_options(words: list[str], match: str, tmp_path: Path) -> None:
    result = run("plan", lengths_file(tmp_path, [5], "txt"), *words)
    assert isinstance(result.exception, PlanError)
    with pytest.raises(PlanError, match=match):
        raise result.exception


@pytest.mark.parametrize("option", [["--plot", "plan.png"], ["--exact"]])
def test_a_histogram_has_no_one_plan(option: list[str]) -> None:
    result = run("plan", "--histogram", "h.json", "--devices", "8", "--cost", "flexsp-7b", *option)
    assert isinstance(result.exception, PlanError)
    assert "need a file of lengths" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "folder"), ("no/plan.png", "no folder"), ("plan", "png"), ("a.doc", "svg")],
)
@pytest.mark.parametrize("name_of_command", ["plan", "simulate"])
def test_a_picture_that_cannot_be_written_is_refused_before_planning(
    name_of_command: str, name: str, said: str, tmp_path: Path
) -> None:
    path = lengths_file(tmp_path, [10**9], "txt")  # whose planning would fail
    words = ["--devices", "8", "--cost", "flexsp-7b", "--plot", str(tmp_path / name)]
    result = run(name_of_command, path, *words)
    assert isinstance(result.exception, PlanError)
    assert "cannot write the plot" in str(result.exception)
    assert said in str(result.exception)


def test_a_cost_file_and_a_sequence_that_fits_nowhere(tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(SMALL.to_json()))
    path = lengths_file(tmp_path, [100, 90_000], "txt")
    memory = str(16384 / 2**30)
    words = ["--devices", "4", "--cost", str(cost), "--memory-gib", memory]
    result = run("plan", path, *words)
    assert isinstance(result.exception, InfeasiblePlanError)
    assert "90000 tokens" in str(result.exception)
    result = run("plan", lengths_file(tmp_path, [100, 60_000], "json"), *words, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["micro_batches"][0]["groups"][0]["degree"] == 4
