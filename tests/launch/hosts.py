"""Several "hosts" on one machine: network namespaces with addresses of their own, on a bridge.

Where namespaces are not permitted, the hosts are Ray nodes that share this machine's address.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from seqpar.launch.emit import HEALTH_CHECKS
from seqpar.launch.security import ensure_token

DASHBOARD = 8265 + os.getpid() % 500
SERIAL = itertools.count()
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Host:
    """One host: its address, the words that run a command on it, and this side of its wire."""

    name: str
    address: str
    prefix: tuple[str, ...] = ()
    wire: str | None = None

    def run(self, *words: str, environment: dict[str, str]) -> None:
        """Run a command on the host to its end."""
        subprocess.run(
            [*self.prefix, *words],
            env=environment,
            check=True,
            timeout=60,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@dataclass
class RayHosts:
    """A Ray cluster over hosts; the first is its head. `raylets` maps a host's index to its
    raylet's process id, for the hosts that run Ray and can be reached."""

    hosts: list[Host]
    cpus: Sequence[int]
    environment: dict[str, str]
    port: int
    raylets: dict[int, int] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{self.port}"

    def start(self, index: int) -> None:
        """Start Ray on a host."""
        host = self.hosts[index]
        before = self._raylets()
        place = ["--head", f"--port={self.port}", f"--dashboard-port={DASHBOARD}"]
        place = place if index == 0 else [f"--address={self.address}"]
        node = [f"--node-ip-address={host.address}", f"--num-cpus={self.cpus[index]}"]
        words = [RAY, "start", *place, *node, "--disable-usage-stats"]
        host.run(*words, environment=self.environment)
        (self.raylets[index],) = self._raylets() - before

    def kill_last(self) -> None:
        """Kill the raylet of the last host that runs one, and Ray's processes there with it."""
        psutil.Process(self.raylets.pop(max(self.raylets))).kill()

    def cut_off_last(self) -> None:
        """Cut the last host's wire: nothing reaches it, and nothing there is told."""
        index = max(self.raylets)
        wire = self.hosts[index].wire
        assert wire is not None, "this host is the machine itself, which must not be cut off"
        del self.raylets[index]
        _ip(f"link set {wire} down")

    @property
    def can_cut_off(self) -> bool:
        """Whether the hosts have wires of their own."""
        return all(host.wire for host in self.hosts)

    def _raylets(self) -> set[int]:
        """The raylets of this cluster, which alone have its token."""
        found = set()
        for process in psutil.process_iter(["name", "environ"]):
            token = (process.info["environ"] or {}).get("RAY_AUTH_TOKEN_PATH")
            if process.info["name"] == "raylet" and token == self.token:
                found.add(process.pid)
        return found

    @property
    def token(self) -> str:
        """Path of the cluster's token."""
        return self.environment["RAY_AUTH_TOKEN_PATH"]

    def stop(self) -> None:
        """End every process that was started for this cluster."""
        for process in psutil.process_iter(["cmdline", "environ"]):
            words = " ".join(process.info["cmdline"] or [])
            environment = process.info["environ"] or {}
            token = environment.get("RAY_AUTH_TOKEN_PATH")
            if token == self.token and ("ray" in words) and process.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@contextlib.contextmanager
def ray_hosts(cpus: Sequence[int], *, started: int | None = None) -> Iterator[RayHosts]:
    """A Ray cluster over hosts with that many CPUs each, its own token, and its own folder.

    Ray runs on the first `started` of them; on all by default.
    """
    folder = Path(tempfile.mkdtemp(prefix="seqpar-ray-"))
    token = folder / "token"
    ensure_token(token)
    environment = {
        **os.environ,
        # A cluster's nodes have the job's interpreter on their path, an unactivated venv has not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_enable_open_telemetry": "0",
        **HEALTH_CHECKS,
    }
    with namespaces(len(cpus)) as hosts:
        cluster = RayHosts(hosts, cpus, environment, port=6401 + os.getpid() % 500)
        try:
            for index in range(len(cpus) if started is None else started):
                cluster.start(index)
            yield cluster
        finally:
            cluster.stop()
            time.sleep(0.5)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Network namespaces with addresses of their own; this machine `count` times if forbidden."""
    tag = f"{os.getpid() % 10000}{next(SERIAL)}"  # a namespace that was deleted goes a while later
    subnet = f"10.231.{os.getpid() % 250}"
    bridge = f"sqb{tag}"
    hosts = [
        Host(
            f"sq{tag}-{i}",
            f"{subnet}.{i + 1}",
            ("ip", "netns", "exec", f"sq{tag}-{i}"),
            f"sqv{tag}-{i}",
        )
        for i in range(count)
    ]
    try:
        permitted = _permitted(bridge)
        if permitted:
            _connect(bridge, hosts)
        yield hosts if permitted else _here(count)
    finally:
        for host in hosts:
            _ip(f"link del {host.wire}", check=False)
            _ip(f"netns del {host.name}", check=False)
        _ip(f"link del {bridge}", check=False)


def _here(count: int) -> list[Host]:
    return [Host(f"node-{i}", "127.0.0.1") for i in range(count)]


def _permitted(bridge: str) -> bool:
    """Whether this process may make links at all; makes the bridge."""
    try:
        _ip(f"link add {bridge} type bridge")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _connect(bridge: str, hosts: list[Host]) -> None:
    """Make the hosts and wire them up; an error here is one of the harness, and is raised."""
    _ip(f"link set {bridge} up")
    for host in hosts:
        _ip(f"netns add {host.name}")
        _ip(f"link add {host.wire} type veth peer name eth0 netns {host.name}")
        _ip(f"link set {host.wire} master {bridge} up")
        _ip(f"-n {host.name} addr add {host.address}/24 dev eth0")
        _ip(f"-n {host.name} link set eth0 up")
        _ip(f"-n {host.name} link set lo up")


def _ip(words: str, *, check: bool = True) -> None:
    try:
        subprocess.run(["ip", *words.split()], check=check, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        if check:
            raise
