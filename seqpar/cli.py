"""The command line: a table of commands, each loaded only when it is called.

`seqpar --help` imports Typer and nothing heavier; a command's module, and torch or Ray behind it,
is imported when that command runs. Each command is `seqpar/commands/<name>.py` with one function
`command`, a thin shell over functions that a script could call.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from seqpar.errors import LaunchError, SeqparError

__all__ = ["app", "main"]

COMMANDS = {
    "launch": "Run a job file, or a script, on local processes or on Ray.",
    "plan": "Plan micro-batches and groups for given sequence lengths.",
    "simulate": "Replay a plan or a length histogram on a modelled cluster.",
    "calibrate": "Measure this machine and write the cost file that plans use.",
    "check": "Compare a wrapped model with one device.",
    "doctor": "Show versions, devices and engines, and what is missing.",
    "status": "Show a job: its state, and each rank's step and last sign of life.",
    "logs": "Print or follow a job's logs.",
    "stop": "Stop a job and everything it started.",
    "bench": "Run the benchmarks.",
}
PASS_THROUGH = {"launch"}
"""Commands whose words after the script belong to the script."""


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and help, and imports the one that is called."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in PASS_THROUGH:
            rest = job_file_last(rest)
        return name, load_command(name) if name in COMMANDS else command, rest


def job_file_last(args: list[str]) -> list[str]:
    """A job file takes no words after it, so options may stand on either side of it."""
    for index, word in enumerate(args):
        if word == "--" or word.endswith(".py"):
            break
        if word.endswith((".yaml", ".yml")):
            return [*args[:index], *args[index + 1 :], word]
    return args


def load_command(name: str) -> TyperCommand:
    """Import `seqpar.commands.<name>` and make a Typer command of its function."""
    module = importlib.import_module(f"seqpar.commands.{name}")
    single = typer.Typer(add_completion=False)
    settings = {"allow_interspersed_args": False} if name in PASS_THROUGH else {}
    single.command(name, context_settings=settings)(module.command)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


app = typer.Typer(
    name="seqpar",
    cls=LazyGroup,
    help="Train on sequences longer than one device: plan, launch, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Train on sequences longer than one device: plan, launch, check."""


def exit_code_of(error: SeqparError) -> int:
    """The script's own code for a failed job, 2 for bad input, 1 for the rest."""
    code = getattr(error, "exit_code", None)
    if isinstance(error, LaunchError) and isinstance(code, int):
        return code if code >= 0 else 128 - code
    return 2 if isinstance(error, ValueError | TypeError) else 1


def main() -> None:
    """Entry point of the `seqpar` script. A SeqparError ends in one line, never a traceback."""
    try:
        app()
    except SeqparError as error:
        print(f"seqpar: {error}", file=sys.stderr)
        raise SystemExit(exit_code_of(error)) from None


if __name__ == "__main__":
    main()
