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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

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
    """A Ray cluster over hosts; the first is its head."""

    hosts: list[Host]
    environment: dict[str, str]
    port: int
    raylets: list[int] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{self.port}"

    def start(self, index: int, *, cpus: int) -> None:
        """Start Ray on a host."""
        host = self.hosts[index]
        before = _raylets()
        place = ["--head", f"--port={self.port}", f"--dashboard-port={DASHBOARD}"]
        place = place if index == 0 else [f"--address={self.address}"]
        node = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}"]
        words = [RAY, "start", *place, *node, "--disable-usage-stats"]
        host.run(*words, environment=self.environment)
        self.raylets.append(next(iter(_raylets() - before)))

    def kill(self, index: int) -> None:
        """Kill a host's raylet, and Ray's processes on it with it."""
        psutil.Process(self.raylets[index]).kill()

    def cut_off(self, index: int) -> None:
        """Take a host's interface down: nothing reaches it, and nothing there is told."""
        host = self.hosts[index]
        subprocess.run([*host.prefix, "ip", "link", "set", "eth0", "down"], check=True)

    def stop(self) -> None:
        """End every process that was started for this cluster."""
        mine = self.environment["RAY_AUTH_TOKEN_PATH"]
        for process in psutil.process_iter(["cmdline", "environ"]):
            words = " ".join(process.info["cmdline"] or [])
            environment = process.info["environ"] or {}
            token = environment.get("RAY_AUTH_TOKEN_PATH")
            if token == mine and ("ray" in words) and process.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _raylets() -> set[int]:
    return {
        process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"
    }


@contextlib.contextmanager
def ray_hosts(count: int, *, cpus: int, started: int | None = None) -> Iterator[RayHosts]:
    """A Ray cluster over `count` hosts with `cpus` each, its own token, and its own folder.

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
    }
    with namespaces(count) as hosts:
        cluster = RayHosts(hosts, environment, port=6401 + os.getpid() % 500)
        try:
            for index in range(count if started is None else started):
                cluster.start(index, cpus=cpus)
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
