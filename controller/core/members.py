"""Which servers a scale-out adds to an upstream, and which ones a scale-in may take from it for good."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from controller.core.events import ChangeWished
from controller.core.model import Group, Refused

_BY_HAND = "edit the `server` line with `headgate server`, or what its name resolves to"


def coming(group: Group, wish: ChangeWished) -> tuple[str, ...]:
    """The keys of servers that are to be added: IP addresses with or without a port, or unix sockets; Refused."""
    name = group.upstream.name
    there = {(server.ip, server.port): server.key for server in group.upstream.servers}
    keys: dict[str, None] = {}
    for address in wish.servers:
        place = _endpoint(address)
        if place is None:
            raise Refused("invalid", f"{address!r} is no IP address with a port, nor unix:/path", _BY_HAND)
        if place in there:
            what = f"{name} has the server {there[place]} already"
            raise Refused("invalid", what, f"start it with `headgate start {name} {there[place]}`")
        there[place] = address
        keys[address] = None
    if not keys:
        raise Refused("invalid", f"a scale-out of {name} needs the servers that are to come", "name their addresses")
    if wish.weight < 1:
        raise Refused("invalid", f"weight {wish.weight} is none that nginx takes", "write 1 or more")
    return tuple(keys)


def going(group: Group, keys: Sequence[str]) -> tuple[str, ...]:
    """These servers, where they can leave the upstream for good; Refused."""
    name, servers = group.upstream.name, {server.key: server for server in group.upstream.servers}
    if not keys:
        raise Refused("invalid", f"a scale-in of {name} needs the servers that are to go", "name them")
    for key in keys:
        if servers[key].address != key:
            message = f"{servers[key].address} is a host name, whose one line stands for all of its addresses"
            raise Refused("invalid", message, _BY_HAND)
    if len(keys) == len(servers):
        message = f"{name} would have no server, which nginx refuses"
        raise Refused("invalid", message, f"leave one, or stop them with `headgate stop {name} …`")
    return tuple(keys)


def _endpoint(address: str) -> tuple[str, int] | None:
    """IP address and port as nginx understands them, a unix socket with port 0; None for anything else."""
    if re.fullmatch(r"unix:/\S+", address):
        return address, 0
    found = re.fullmatch(r"(?:\[(?P<six>[^]]+)\]|(?P<four>[0-9.]+))(?::(?P<port>[0-9]{1,5}))?", address)
    if found is None:
        return None
    host, port = found["six"] or found["four"], int(found["port"] or 80)
    try:
        known = (ipaddress.IPv6Address if found["six"] else ipaddress.IPv4Address)(host)
    except ValueError:
        return None
    return (str(known) if found["four"] else host, port) if 0 < port < 65536 else None
