"""From a routing table back to peers: what nginx serves is remembered where the store is not.

The other direction, and the table's shape, stand in table.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controller.core.model import Admin, Health, Peer, Quarantine, Routing, Warmth, WarmUp

_AWAY = 120.0  # seconds that a quarantine lasts of which the end is not known
_WHY = "nginx's table says so; until when is not known any more"


def peers(table: Mapping[str, Any], now: float) -> dict[tuple[str, str], Peer]:
    """The peers of a routing table, by upstream and server key, so that the next table sends the traffic as this one.

    Empty where the table is not what `table.table` makes.
    """
    try:
        return {
            (name, server["key"]): _peer(server, now)
            for name, upstream in table["upstreams"].items()
            for server in upstream["servers"]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def addresses(table: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The IP addresses of the host names in a routing table, by the address of their `server` line as written."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        servers = [server for upstream in table["upstreams"].values() for server in upstream["servers"]]
        for written, ip in {(each["address"], each["ip"]): None for each in servers if "address" in each}:
            found[written] = (*found.get(written, ()), ip)
    except (AttributeError, KeyError, TypeError):
        return {}
    return found


def _peer(server: Mapping[str, Any], now: float) -> Peer:
    forgiven = int(server.get("forgive", 0))
    match Routing(server["state"]):
        case Routing.UP:
            return Peer(health=Health.UP, incumbent=True, forgiven=forgiven, warm_up=_warm_up(server, now))
        case Routing.DRAIN | Routing.SESSIONS as state:
            return Peer(admin=Admin.DRAIN, forgiven=forgiven, sessions=state is Routing.SESSIONS)
        case Routing.MAINT:
            return Peer(admin=Admin.MAINT, forgiven=forgiven)
        case Routing.QUARANTINE:
            return Peer(forgiven=forgiven, quarantine=(Quarantine(now + _AWAY, _WHY),))
        case Routing.DOWN | Routing.WAITING:
            return Peer(health=Health.DOWN, forgiven=forgiven)


def _warm_up(server: Mapping[str, Any], now: float) -> WarmUp:
    ramp = server.get("warm_up")
    if ramp is None:
        return WarmUp()
    elapsed = float(ramp["elapsed_ms"]) / 1000
    waits = not elapsed and ramp["starts"] == "first-request"
    return WarmUp(Warmth.WAITING if waits else Warmth.RUNNING, elapsed, now, int(ramp["epoch"]), "as in nginx's table")
