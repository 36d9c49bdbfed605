"""`seqpar doctor --cluster`: what every node has, and whether each pair of nodes can talk.

A connected Ray proves nothing about gloo: it may bind another interface than the one that Ray
uses. So one process a node, on the interface that owns the node's address, sends to every other
one and times it; then groups of growing degree exchange all to all.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from seqpar.errors import LaunchError
from seqpar.launch.security import enable_token_auth, token_path

__all__ = ["ClusterReport", "probe_cluster"]

PROBE_BYTES = 4 << 20
SMALL_BYTES = 4 << 10
REPETITIONS = 3
CLOCK_LIMIT_S = 1.0


@dataclass(frozen=True)
class ClusterReport:
    """`nodes` as each tells, `pairs` with their latency and bandwidth, `transfers` as rows of
    (bytes that each device sends, degree, ms) for `seqpar.planners.cluster_links`, and `faults`:
    what would keep a job from running, each with what to change."""

    nodes: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    transfers: list[tuple[int, int, float]]
    faults: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def probe_cluster(address: str, *, timeout_s: float = 60.0) -> ClusterReport:
    """Join the cluster at `address` and ask every node.

    Raises:
        LaunchError: the cluster cannot be joined, or a node does not answer in time.
    """
    from seqpar.launch.jobs import require_cluster_token

    require_cluster_token(address)
    enable_token_auth()
    import ray

    from seqpar.launch.ray_cluster import connect, own_package

    connect(address, own_package())
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = _on_each(alive, node_report, [()] * len(alive), timeout_s)
        told = _measure(alive, timeout_s) if len(alive) > 1 else []
    finally:
        ray.shutdown()
    faults = compare_nodes(nodes) + compare_clocks([part["clock"] for part in told])
    pairs = [pair for part in told for pair in part["pairs"]]
    return ClusterReport(nodes, pairs, told[0]["transfers"] if told else [], faults)


def _on_each(
    nodes: list[dict[str, Any]], function: Any, arguments: list[tuple[Any, ...]], timeout_s: float
) -> list[Any]:
    """Run the function on every node at once; the answers in the nodes' order."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = [
        remote.options(scheduling_strategy=OnNode(node["NodeID"], soft=False)).remote(*given)
        for node, given in zip(nodes, arguments, strict=True)
    ]
    _, late = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    if late:
        silent = [n["NodeManagerAddress"] for n, a in zip(nodes, asked, strict=True) if a in late]
        raise LaunchError(
            f"nodes {silent} did not answer within {timeout_s:g} s: are their ports open to the "
            "others, and is the interface the one that owns the node's address?"
        )
    return list(ray.get(asked))


def node_report() -> dict[str, Any]:
    """What one node has; runs there."""
    import ray

    from seqpar.launch.machine import inspect_machine
    from seqpar.launch.ray_worker import interface_of

    address = ray.util.get_node_ip_address()
    token = token_path()
    mode = oct(token.stat().st_mode & 0o777) if token.exists() else None
    return {
        "address": address,
        "interface": interface_of(address),
        "token_mode": mode,
        "ephemeral_ports": _ephemeral_ports(),
        **inspect_machine().as_dict(),
    }


def _ephemeral_ports() -> str | None:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            return "-".join(file.read().split())
    except OSError:
        return None


def compare_nodes(nodes: list[dict[str, Any]]) -> list[str]:
    """What differs between nodes and must not, each with the remedy."""
    faults = []
    for package in ("python", "torch", "ray"):
        versions = {node["address"]: node["versions"].get(package) for node in nodes}
        if len(set(versions.values())) > 1:
            faults.append(f"{package} differs: {versions}; install one version on all nodes")
    for node in nodes:
        if not node["interface"]:
            faults.append(f"{node['address']}: no interface owns it; set --node-ip-address")
        if node["token_mode"] not in (None, "0o600"):
            faults.append(f"{node['address']}: token is {node['token_mode']}; chmod 600 it")
        if node["system"]["disk_free_bytes"] < 1 << 30:
            faults.append(f"{node['address']}: under 1 GiB of disk is free")
    return faults


def compare_clocks(clocks: list[float]) -> list[str]:
    """Clocks that are apart; each was read when its node left the same barrier."""
    apart_s = max(clocks, default=0.0) - min(clocks, default=0.0)
    if apart_s <= CLOCK_LIMIT_S:
        return []
    return [f"clocks are {apart_s:.1f} s apart; run chrony or ntpd on all nodes"]


def _measure(nodes: list[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
    import ray
    from torch._C._distributed_c10d import TCPStore

    host = ray.util.get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    arguments = [(rank, len(nodes), host, store.port, timeout_s) for rank in range(len(nodes))]
    return _on_each(nodes, probe_links, arguments, timeout_s)


def probe_links(rank: int, world: int, host: str, port: int, timeout_s: float) -> dict[str, Any]:
    """One node's part in the probe of all pairs and degrees; runs there."""
    import ray
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    from seqpar.launch.ray_worker import interface_of

    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(ray.util.get_node_ip_address())
    store = TCPStore(host, port, is_master=False)
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    payload = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    pairs = []
    for a, b in itertools.combinations(range(world), 2):
        if rank in (a, b):
            small_s = _ping(payload[:1], rank == a, b if rank == a else a)
            large_s = _ping(payload, rank == a, b if rank == a else a)
            rate = PROBE_BYTES / max(large_s - small_s, 1e-9)
            link = {"latency_ms": round(small_s * 1e3, 3), "bandwidth_bytes_per_s": round(rate)}
            pairs += [{"a": a, "b": b, **link}] if rank == a else []
    degrees = [2**i for i in range(1, world.bit_length()) if 2**i <= world]
    transfers = [row for degree in degrees for row in _all_to_all_ms(payload, rank, degree)]
    dist.barrier()
    clock = time.time()
    dist.destroy_process_group()
    return {"pairs": pairs, "transfers": transfers, "clock": clock}


def _ping(payload: Any, first: bool, peer: int) -> float:
    """Seconds of one way, the best of a few there and back."""
    import torch.distributed as dist

    times = []
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        if first:
            dist.send(payload, peer)
            dist.recv(payload, peer)
        else:
            dist.recv(payload, peer)
            dist.send(payload, peer)
        times.append((time.perf_counter() - started) / 2)
    return min(times)


def _all_to_all_ms(payload: Any, rank: int, degree: int) -> list[tuple[int, int, float]]:
    """(bytes that each sends, degree, ms) of all-to-alls of the first `degree` nodes, small and
    large; nothing for those outside."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(list(range(degree)))
    if rank >= degree:
        return []
    rows = []
    for size in (SMALL_BYTES, PROBE_BYTES):
        block = payload[: size // degree * degree]
        times = []
        for _ in range(REPETITIONS + 1):
            dist.barrier(group)
            started = time.perf_counter()
            dist.all_to_all_single(torch.empty_like(block), block, group=group)
            times.append((time.perf_counter() - started) * 1e3)
        sent = block.numel() // degree * (degree - 1)  # a rank's own part stays where it is
        rows.append((sent, degree, round(min(times), 4)))
    return rows
