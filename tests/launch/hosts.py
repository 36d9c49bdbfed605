"""Several "hosts" on one machine: network namespaces with addresses of their own, on a bridge.

Where namespaces are not permitted, the hosts are Ray nodes that share this machine's address.
"""

from __future__ import annotations

import contextlib
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
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Host:
    """One host: its address, the words that run a command on it, and its raylet."""

    name: str
    address: str
    prefix: tuple[str, ...] = ()

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
        """Take the last host's interface down: nothing reaches it, and nothing there is told."""
        index = max(self.raylets)
        del self.raylets[index]
        words = [*self.hosts[index].prefix, "ip", "link", "set", "eth0", "down"]
        subprocess.run(words, check=True)

    @property
    def can_cut_off(self) -> bool:
        """Whether the hosts have interfaces of their own."""
        return bool(self.hosts[0].prefix)

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
    tag = f"{os.getpid() % 10000}"
    subnet = f"10.231.{os.getpid() % 250}"
    bridge = f"sqb{tag}"
    hosts = [
        Host(f"sq{tag}-{i}", f"{subnet}.{i + 1}", ("ip", "netns", "exec", f"sq{tag}-{i}"))
        for i in range(count)
    ]
    try:
        try:
            _connect(bridge, tag, hosts)
        except (OSError, subprocess.CalledProcessError):
            yield [Host(f"node-{i}", "127.0.0.1") for i in range(count)]
        else:
            yield hosts
    finally:
        for host in hosts:
            _ip(f"netns del {host.name}", check=False)
        _ip(f"link del {bridge}", check=False)


def _connect(bridge: str, tag: str, hosts: list[Host]) -> None:
    _ip(f"link add {bridge} type bridge")
    _ip(f"link set {bridge} up")
    for i, host in enumerate(hosts):
        _ip(f"netns add {host.name}")
        _ip(f"link add sqv{tag}{i} type veth peer name eth0 netns {host.name}")
        _ip(f"link set sqv{tag}{i} master {bridge} up")
        _ip(f"-n {host.name} addr add {host.address}/24 dev eth0")
        _ip(f"-n {host.name} link set eth0 up")
        _ip(f"-n {host.name} link set lo up")


def _ip(words: str, *, check: bool = True) -> None:
    try:
        subprocess.run(["ip", *words.split()], check=check, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        if check:
            raise
