"""`seqpar doctor`: what this machine has and lacks."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from seqpar.errors import JobSpecError


def command(
    cluster: Annotated[
        str | None, typer.Option(help="Also ask every node of the Ray cluster at this address.")
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(help="With --cluster: put the measured links into this cost file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show versions, devices and engines, and what is missing with the command that installs it."""
    if cluster is not None:
        probe(cluster, cost, as_json)
        return
    if cost is not None:
        raise JobSpecError("--cost takes what --cluster measures: give --cluster ADDRESS too")
    from seqpar.launch.machine import inspect_machine

    machine = inspect_machine()
    if as_json:
        print(json.dumps(machine.as_dict()))
    else:
        show(machine)
    if not machine.healthy:
        raise typer.Exit(1)


def probe(address: str, cost: str | None, as_json: bool) -> None:
    """Ask every node of a cluster; exit code 1 if something would keep a job from running."""
    from seqpar.launch.cluster_probe import probe_cluster
    from seqpar.planners.cluster_links import links_of, write_links
    from seqpar.planners.cost import CostModel

    if cost is not None:
        CostModel.load(cost)  # a bad file is told before anything is measured
    report = probe_cluster(address)
    if cost is not None:
        write_links(cost, links_of(report.transfers))
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        show_cluster(report)
    if report.faults:
        raise typer.Exit(1)


def show_cluster(report: Any) -> None:
    """A cluster's report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("node", "address", "interface", "torch", "ray", "devices", "disk", title="Nodes")
    for index, node in enumerate(report.nodes):
        disk = f"{node['system']['disk_free_bytes'] / 2**30:.0f} GiB"
        versions = node["versions"]
        words = (str(index), node["address"], node["interface"])
        count = str(len(node["devices"]))
        table.add_row(*words, versions["torch"], versions["ray"], count, disk)
    console.print(table)
    table = Table("pair", "latency", "bandwidth", title="Links (gloo)")
    for pair in report.pairs:
        rate = pair["bandwidth_bytes_per_s"] / 1e9
        table.add_row(f"{pair['a']}-{pair['b']}", f"{pair['latency_ms']} ms", f"{rate:.2f} GB/s")
    console.print(table)
    table = Table("degree", "ms, small and large message", title="All-to-all, a rank on each node")
    for degree in sorted({degree for _, degree, _ in report.transfers}):
        times = [f"{ms:.2f}" for _, found, ms in report.transfers if found == degree]
        table.add_row(str(degree), ", ".join(times))
    console.print(table)
    for fault in report.faults:
        console.print(fault, style="red", markup=False)


def show(machine: Any) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # [ray] is part of a command, no style
    table = Table("package", "version", "to install", title="Packages")
    for name, version in machine.versions.items():
        table.add_row(name, version, "")
    for name, install in machine.missing.items():
        table.add_row(name, "missing", install)
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
