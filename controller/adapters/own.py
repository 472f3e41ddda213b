"""Which of the servers that nginx knows a process on this machine is, by the sockets that it listens on."""

from __future__ import annotations

from collections.abc import Iterable

from controller.adapters import procfs
from controller.core.model import Server
from controller.ports import ProcessError


def served_by(pid: int, addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses (as the API gives them) that this process or one that it forked listens on; ProcessError."""
    processes = procfs.table()
    found = []
    for address, server in _servers(addresses) if pid in processes else ():
        inodes = procfs.listening(server, pid)
        holders = procfs.holders(inodes)
        if inodes and not holders:
            message = f"something listens on {address}, but its process cannot be seen"
            raise ProcessError(message, "run this as root with CAP_SYS_PTRACE")
        if any(procfs.within(holder, pid, processes) for holder in holders):
            found.append(address)
    return tuple(found)


def at_port(port: int, addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses of this machine with this port."""
    return tuple(address for address, server in _servers(addresses) if server.port == port and procfs.is_local(server))


def _servers(addresses: Iterable[str]) -> Iterable[tuple[str, Server]]:
    for address in dict.fromkeys(addresses):
        if address.startswith("unix:"):
            yield address, Server(address, address, address, 0)
            continue
        written, _, ip = address.partition("@")
        host, colon, port = written.rpartition(":")
        if not (colon and port.isdecimal()):
            host, port = written, "80"
        yield address, Server(address, address, (ip or host).strip("[]"), int(port))
