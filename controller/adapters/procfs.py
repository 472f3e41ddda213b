"""What /proc says of processes and of the sockets they listen on.

Only reading belongs here. Everything blocks for some milliseconds: call it in a thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import psutil

from controller.core.model import Server

_TICKS = os.sysconf("SC_CLK_TCK")
_LISTEN = "0A"  # TCP_LISTEN, /proc/net/tcp column `st`
_OPEN = ("01", "03")  # TCP_ESTABLISHED, TCP_SYN_RECV: not closed by either end
_ACCEPTING = "00010000"  # __SO_ACCEPTCON, /proc/net/unix column `Flags`

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Process:
    """A living process. `created` is in seconds since boot: unlike a wall clock's time it never moves."""

    pid: int
    parent: int
    session: int
    created: float


def read(pid: int) -> Process | None:
    """The process of this pid; None where there is none, or only a zombie."""
    fields = _stat(pid)
    if not fields or fields[0] in b"ZX":
        return None
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]) / _TICKS)


def spent_by_ended_children(pid: int) -> int:
    """CPU time, in clock ticks, of all children of this process that have ended and were waited for; 0 where it is
    gone. It grows by what each of them used, however short its life was."""
    fields = _stat(pid)
    return int(fields[13]) + int(fields[14]) if fields else 0


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on, which proc(5) counts from 3; empty where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return []
    # The name before them stands in parentheses and may hold any byte.
    return text[text.rindex(b")") + 2 :].split()


def table() -> dict[int, Process]:
    """All living processes by pid."""
    return {pid: process for pid in psutil.pids() if (process := read(pid)) is not None}


def within(pid: int, root: int, processes: Mapping[int, Process]) -> bool:
    """Whether this process is `root` or descends from it."""
    return root in lineage(pid, processes)


def lineage(pid: int, processes: Mapping[int, Process]) -> Iterator[int]:
    """The process itself, its parent, and so on up to the first one."""
    while pid in processes:
        yield pid
        pid = processes[pid].parent


def executable(pid: int) -> str:
    """The path of its program, empty where it has none (a kernel thread) or is gone; PermissionError."""
    try:
        return psutil.Process(pid).exe()
    except psutil.NoSuchProcess:
        return ""
    except psutil.AccessDenied as error:
        raise PermissionError(f"/proc/{pid}/exe") from error


def command(pid: int) -> list[str]:
    """Its command line, else its name in brackets; empty where it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.cmdline() or [f"[{process.name()}]"]
    return []


def environment(pid: int) -> list[bytes]:
    """`NAME=value` as it was at its exec; empty where we may not look or it is gone."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return []


def is_local(server: Server) -> bool:
    """Whether connections to this server end on this machine, in this network namespace."""
    if server.ip.startswith("unix:"):
        return True
    ip = _address(server.ip)
    entries = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    own = (_address(entry.address) for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6))
    return ip.is_loopback or ip in own


def same_network(pid: int) -> bool:
    """Whether this process is in our network namespace; PermissionError."""
    return _link(f"/proc/{pid}/ns/net") == _link("/proc/self/ns/net")


def listening(server: Server, pid: int | None = None, wildcards: bool = True) -> frozenset[int]:
    """Inodes of the sockets that accept this server's connections, in the network namespace of process `pid` (ours).

    A socket bound to the very address is taken before one bound to all (`0.0.0.0`, `::`), as the kernel does it.
    """
    net = f"/proc/{pid or 'self'}/net"
    if server.ip.startswith("unix:"):
        return _listening_unix(server.ip.removeprefix("unix:"), net)
    wanted = _address(server.ip)
    ranks: tuple[set[int], ...] = (set(), set(), set())
    for family in ("tcp", "tcp6"):
        for fields in _rows(f"{net}/{family}"):
            host, _, port = fields[1].partition(":")
            if fields[3] != _LISTEN or int(port, 16) != server.port:
                continue
            ip = _kernel_address(host)
            if ip == wanted:
                ranks[0].add(int(fields[9]))
            elif wildcards and ip.is_unspecified and ip.version == wanted.version:
                ranks[1].add(int(fields[9]))
            elif wildcards and ip.is_unspecified and ip.version == 6:
                ranks[2].add(int(fields[9]))
    return frozenset(next(filter(None, ranks), ()))


def server_end(ours: tuple[str, int], theirs: tuple[str, int], pid: int) -> int | None:
    """The inode of the server's end of a TCP connection in the network namespace of process `pid`, by the addresses of
    our end and of theirs; 0 while no process has accepted it, None where it is gone or the server has closed it."""
    wanted = [(_address(host), port) for host, port in (theirs[:2], ours[:2])]
    for family in ("tcp", "tcp6"):
        for fields in _rows(f"/proc/{pid}/net/{family}"):
            ends = [field.partition(":") for field in fields[1:3]]
            # The ports first: they are cheap to compare, and there may be many connections.
            if [int(port, 16) for _, _, port in ends] == [wanted[0][1], wanted[1][1]] and [
                _kernel_address(host) for host, _, _ in ends
            ] == [wanted[0][0], wanted[1][0]]:
                return int(fields[9]) if fields[3] in _OPEN else None
    return None


def connections(path: str, pid: int) -> list[int]:
    """The inodes of the server's ends of all connections to a unix socket, in the network namespace of process `pid`; 0
    for each that no process has accepted yet."""
    net = f"/proc/{pid}/net"
    listeners = _listening_unix(path, net)
    rows = [fields for fields in _rows(f"{net}/unix", columns=8) if len(fields) == 8]
    bound = {fields[7] for fields in rows if int(fields[6]) in listeners}
    return [int(fields[6]) for fields in rows if fields[3] != _ACCEPTING and fields[7] in bound]


def holders(inodes: Collection[int], among: Collection[int] | None = None) -> frozenset[int]:
    """Pids of the processes, all or `among` some, that hold one of these sockets, as far as we may look into them."""
    links = {f"socket:[{inode}]" for inode in inodes}
    pids = psutil.pids() if among is None else among
    return frozenset(pid for pid in pids if _holds(pid, links)) if links else frozenset()


def _holds(pid: int, links: set[str]) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_link(entry.path) in links for entry in entries)
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _listening_unix(path: str, net: str) -> frozenset[int]:
    wanted = os.path.realpath(path)
    found = set()
    for fields in _rows(f"{net}/unix", columns=8):
        if len(fields) < 8 or fields[3] != _ACCEPTING:
            continue
        inode, bound = int(fields[6]), fields[7]
        if bound.startswith("/"):
            matches = os.path.realpath(bound) == wanted
        else:  # bound to a relative path (or an abstract `@name`): it counts from its holder's directory
            matches = os.path.basename(bound) == os.path.basename(path) and any(
                os.path.realpath(os.path.join(_link(f"/proc/{pid}/cwd"), bound)) == wanted for pid in holders({inode})
            )
        if matches:
            found.add(inode)
    return frozenset(found)


def _rows(path: str, columns: int = 0) -> Iterator[list[str]]:
    """The rows of a /proc/net file without its heading; none where the kernel lacks the protocol (no IPv6)."""
    with contextlib.suppress(FileNotFoundError), open(path, errors="surrogateescape") as file:
        next(file, None)
        for line in file:
            yield line.rstrip("\n").split(maxsplit=columns - 1)


def _kernel_address(text: str) -> _Address:
    """/proc/net/tcp prints an address as 32-bit words in the machine's byte order."""
    words = (int(text[start : start + 8], 16) for start in range(0, len(text), 8))
    return _unmapped(ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words)))


def _address(text: str) -> _Address:
    return _unmapped(ipaddress.ip_address(text.partition("%")[0]))


def _unmapped(ip: _Address) -> _Address:
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
