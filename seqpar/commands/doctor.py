"""`seqpar doctor`: what this machine has and lacks."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show versions, devices and engines, and what is missing with the command that installs it."""
    from seqpar.launch.machine import inspect_machine

    machine = inspect_machine()
    if as_json:
        print(json.dumps(machine.as_dict()))
    else:
        show(machine)
    if not machine.healthy:
        raise typer.Exit(1)


def show(machine: Any) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("package", "version", "to install", title="Packages")
    for name, version in machine.versions.items():
        table.add_row(name, version, "")
    for name, install in machine.missing.items():
        table.add_row(name, "missing", escape(install))
    console.print(table)
    table = Table("device", "name", "size", title="Devices")
    for device in machine.devices:
        memory = device.get("memory_bytes")
        size = f"{memory / 2**30:.0f} GiB" if memory else f"{device['cores']} cores"
        table.add_row(device["device"], device["name"], size)
    console.print(table)
    table = Table("what", "state", title="Engines and system")
    for name, state in {**machine.engines, **machine.system}.items():
        gib = isinstance(state, int) and name.endswith("_bytes")
        table.add_row(
            name.removesuffix("_bytes"), f"{state / 2**30:.1f} GiB" if gib else str(state)
        )
    console.print(table)
