"""Hosts on one switch: network namespaces of this machine, joined by a bridge in one more. No test stands here."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str:
    """Why no network can be made here; empty where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("iptables", "iptables"), ("keepalived", "keepalived")):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install {package})"
    name = f"hg-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


class Network:
    """`addresses` by host name, each on `eth0` of its host. A context manager; nothing of it is left on exit."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._addresses = addresses
        self._names = {host: f"hg-{os.getpid()}-{host}" for host in ("switch", *addresses)}

    def __enter__(self) -> Network:
        try:
            for name in self._names.values():
                _run("ip", "netns", "add", name)
            self.run("switch", "ip", "link", "add", "br0", "up", "type", "bridge")
            for host, address in self._addresses.items():
                self.run(
                    "switch", "ip", "link", "add", host, "type", "veth", "peer", "eth0", "netns", self._names[host]
                )
                self.run("switch", "ip", "link", "set", host, "up", "master", "br0")
                self.run(host, "ip", "link", "set", "lo", "up")
                self.run(host, "ip", "address", "add", address, "dev", "eth0")
                self.run(host, "ip", "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def on(self, host: str, *command: str) -> list[str]:
        """The command line that runs this on a host; the process keeps its pid."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def run(self, host: str, *command: str) -> str:
        """Run this on a host and return its output."""
        return _run(*self.on(host, *command))

    def holds(self, host: str, address: str) -> bool:
        """Whether the host has this address on its network card."""
        return f" {address}/" in self.run(host, "ip", "-4", "address", "show", "dev", "eth0")

    def within(self, host: str, work: Callable[[], T]) -> T:
        """Call this in a thread whose sockets are the host's."""

        def inside() -> T:
            self.enter(host)
            return work()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inside).result()

    def enter(self, host: str) -> None:
        """Make the calling thread's new sockets the host's."""
        with open(f"/run/netns/{self._names[host]}", "rb") as namespace:
            if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
