"""Which sockets processes hold to servers, and clients to nginx: sock_diag(7), /proc/net, /proc/PID/fd.

Only reading belongs here. Everything blocks: call it in a thread.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from controller.ports import PlaneUnreachable

Endpoint = tuple[str, int]
"""(IP address without brackets, port), or (`unix:/path`, 0)."""

# linux/netlink.h, sock_diag.h, inet_diag.h, unix_diag.h
_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _DUMP, _ERROR, _DONE = 4, 20, 0x301, 2, 3
_SHOW_NAME_PEER_ICONS = 1 | 4 | 8
_NAME, _PEER, _ICONS = 0, 2, 3
_ANY = 0xFFFFFFFF
_TIME_WAIT, _LISTEN = 6, 10
_STATES = 0xFFF & ~(1 << _TIME_WAIT)
_OWED = (1, 3, 4, 8, 9, 11)
"""ESTABLISHED, SYN_RECV, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING: the other end may still wait for bytes of ours."""


def to_servers(endpoints: Collection[Endpoint], master: int) -> dict[int, Endpoint]:
    """The endpoint of each client socket that leads to one of them, by inode, in the network namespace of `master`.

    PlaneUnreachable where the kernel does not say.
    """
    _see_network(master)
    tcp = {_packed(ip, port): (ip, port) for ip, port in endpoints if not ip.startswith("unix:")}
    paths = {ip.removeprefix("unix:"): (ip, port) for ip, port in endpoints if ip.startswith("unix:")}
    return (_to_tcp(tcp) if tcp else {}) | (_to_unix(paths) if paths else {})


def from_clients(master: int) -> int:
    """Connections to the TCP ports that nginx's `master` listens on, whichever process holds them; PlaneUnreachable."""
    _see_network(master)
    rows, own = _tcp(), held(master)
    listening = {row.local for row in rows if row.state == _LISTEN and row.inode in own}
    everywhere = {end[-2:] for end in listening if not any(end[:-2])}
    return sum(row.state in _OWED and (row.local in listening or row.local[-2:] in everywhere) for row in rows)


def held(pid: int) -> frozenset[int]:
    """The inodes of the sockets that a process holds; none where it is gone. PlaneUnreachable where we may not look."""
    inodes = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                try:
                    target = os.readlink(entry.path)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
    except PermissionError as error:
        raise PlaneUnreachable(
            f"the sockets of nginx's worker {pid} cannot be counted ({error})",
            "run the daemon as root or as the workers' user, or give it CAP_SYS_PTRACE",
        ) from error
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    return frozenset(inodes)


def _see_network(master: int) -> None:
    if os.stat(f"/proc/{master}/ns/net") != os.stat("/proc/self/ns/net"):
        raise PlaneUnreachable(
            "nginx runs in another network namespace, where its sockets cannot be counted",
            "run headgate in nginx's network namespace",
        )


# --- TCP --------------------------------------------------------------------------------------------------------------


def _packed(ip: str, port: int) -> bytes:
    return ipaddress.ip_address(ip.partition("%")[0]).packed + struct.pack("!H", port)


class _Tcp(NamedTuple):
    """A TCP socket; its ends are packed addresses, each followed by the port."""

    state: int
    local: bytes
    remote: bytes
    inode: int


def _to_tcp(wanted: Mapping[bytes, Endpoint]) -> dict[int, Endpoint]:
    rows = (row for row in _tcp() if row.state != _LISTEN)
    return {row.inode: wanted[row.remote] for row in rows if row.inode and row.remote in wanted}


def _tcp() -> list[_Tcp]:
    """The TCP sockets of our network namespace, but for those that nobody holds any more (TIME_WAIT)."""
    try:
        return [*_tcp_by_diag(socket.AF_INET, 4), *_tcp_by_diag(socket.AF_INET6, 16)]
    except OSError:  # a kernel without inet_diag; /proc tells the same, ten times slower where many are in TIME_WAIT
        return [*_tcp_by_proc("tcp"), *_tcp_by_proc("tcp6")]


def _tcp_by_diag(family: int, length: int) -> Iterator[_Tcp]:
    """By struct inet_diag_msg."""
    request = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 0, 0, _STATES)
    for message in _dump(request):
        local, remote = message[8 : 8 + length] + message[4:6], message[24 : 24 + length] + message[6:8]
        yield _Tcp(message[1], local, remote, struct.unpack_from("=I", message, 68)[0])


def _tcp_by_proc(name: str) -> Iterator[_Tcp]:
    """The same from /proc/net."""
    try:
        with open(f"/proc/net/{name}", encoding="ascii") as file:
            for row in map(str.split, list(file)[1:]):
                if (state := int(row[3], 16)) != _TIME_WAIT:
                    yield _Tcp(state, _kernel_end(row[1]), _kernel_end(row[2]), int(row[9]))
    except FileNotFoundError:
        return  # no IPv6


def _kernel_end(text: str) -> bytes:
    """/proc/net writes an address as 32-bit words in the machine's byte order, and the port as a number."""
    address, _, port = text.partition(":")
    words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
    return b"".join(struct.pack("=I", word) for word in words) + bytes.fromhex(port)


# --- unix sockets -----------------------------------------------------------------------------------------------------


def _to_unix(paths: Mapping[str, Endpoint]) -> dict[int, Endpoint]:
    """Client sockets by inode: the peers of those that were accepted, and those that wait to be."""
    found: dict[int, Endpoint] = {}
    real = {os.path.realpath(path): endpoint for path, endpoint in paths.items()}
    base = {os.path.basename(path): endpoint for path, endpoint in paths.items()}
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, _ANY, 0, _SHOW_NAME_PEER_ICONS, _ANY, _ANY)
    try:
        messages = list(_dump(request))
    except OSError as error:
        raise PlaneUnreachable(
            f"the kernel does not tell which unix sockets are connected: {error.strerror}",
            "load the kernel module unix_diag, or let nginx reach the servers over TCP",
        ) from error
    for message in messages:
        attributes = _attributes(message[16:])
        name = os.fsdecode(attributes.get(_NAME, b"").rstrip(b"\0"))
        # A relative name counts from a directory that only its process knows: rather one too many than one too few.
        endpoint = real.get(os.path.realpath(name)) if name.startswith("/") else base.get(os.path.basename(name))
        if name and endpoint:
            clients = attributes.get(_PEER, b"") + attributes.get(_ICONS, b"")
            found |= {inode: endpoint for (inode,) in struct.iter_unpack("=I", clients) if inode}
    return found


def _attributes(data: bytes) -> dict[int, bytes]:
    """Netlink attributes by number."""
    found = {}
    while data:
        length, kind = struct.unpack_from("=HH", data)
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def _dump(request: bytes) -> Iterator[bytes]:
    """The kernel's answers to a request for all sockets of a family; OSError where it has none."""
    head = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _SOCK_DIAG) as netlink:
        netlink.send(head + request)
        while True:
            data = netlink.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", data, 16)[0]
                    raise OSError(number, os.strerror(number))
                yield data[16:length]
                data = data[(length + 3) & ~3 :]
