"""From State to the routing table that nginx serves: effective states and weights, fail open, revisions.

The JSON shape is the contract with lua/headgate/table.lua; tests/fixtures/tables holds examples for both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from controller.core import warmup
from controller.core.model import Admin, Group, Health, Peer, Routing, Server, State, Upstream

FORMAT = 1


def routing_of(server: Server, peer: Peer) -> Routing:
    """A peer's state for the balancer: what the operator wants comes first, then quarantine, then health."""
    if server.down or peer.admin is Admin.MAINT:
        return Routing.MAINT
    if peer.admin is Admin.DRAIN:
        return Routing.SESSIONS if peer.sessions else Routing.DRAIN
    if peer.quarantine:
        return Routing.QUARANTINE
    if peer.health is Health.UP or (peer.health is Health.UNKNOWN and peer.incumbent):
        return Routing.UP
    return Routing.DOWN


def serving(group: Group, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The keys of the servers that get traffic by their own right (not by failing open), `without` some."""
    left_out = frozenset(without)
    return tuple(
        server.key
        for server in group.upstream.servers
        if server.key not in left_out and routing_of(server, group.peers[server.key]) is Routing.UP
    )


def effective_weight(group: Group, server: Server, now: float) -> float:
    """What the balancer reckons with: 0 where the server is not picked, else weight times its warm-up share."""
    peer = group.peers[server.key]
    routing = routing_of(server, peer)
    if routing is Routing.UP or (routing is Routing.DOWN and group.fail_open):
        return server.weight * warmup.share(group.upstream.policy.warm_up, peer.warm_up, now)
    return 0.0


def with_peer(state: State, upstream: str, key: str, peer: Peer) -> State:
    """The state with this peer in place of the old one; a new revision only where the routing table changes by it."""
    group = state.groups[upstream]
    before = group.peers[key]
    if peer is before:
        return state
    changed = replace(group, peers={**group.peers, key: peer})
    server = next(s for s in group.upstream.servers if s.key == key)
    if routing_of(server, peer) is not routing_of(server, before):
        changed = replace(changed, fail_open=fails_open(changed))
    differs = changed.fail_open != group.fail_open or _row(changed, server) != _row(group, server)
    return replace(
        state,
        groups={**state.groups, upstream: changed},
        revision=state.revision + 1 if differs else state.revision,
    )


def with_groups(state: State, groups: Mapping[str, Group]) -> State:
    """The state with these groups, after a configuration was read; a new revision only where the table changes."""
    groups = {name: replace(group, fail_open=fails_open(group)) for name, group in groups.items()}
    differs = _rows(groups) != _rows(state.groups)
    return replace(state, groups=groups, revision=state.revision + 1 if differs else state.revision)


def fails_open(group: Group) -> bool:
    """No server is up, and health alone is to blame: then those that are down serve, for one of them may be well."""
    routes = {routing_of(server, group.peers[server.key]) for server in group.upstream.servers}
    return Routing.UP not in routes and Routing.DOWN in routes


def table(state: State, now: float) -> dict[str, object]:
    """The whole table as JSON: `{"format", "revision", "upstreams": {NAME: {"method", "fail_open", "servers"}}}`.

    Beside `method` stands what belongs to it: `key` and `consistent` for hash, `two` for random.

    An upstream without servers is left out: nginx then balances it by itself.
    """
    return {
        "format": FORMAT,
        "revision": state.revision,
        "upstreams": {
            name: {
                **_method(group.upstream),
                "fail_open": group.fail_open,
                "servers": [_server(group, server, now) for server in group.upstream.servers],
            }
            for name, group in state.groups.items()
            if group.upstream.servers
        },
    }


def _method(upstream: Upstream) -> dict[str, object]:
    method: dict[str, object] = {"method": upstream.method}
    if upstream.method == "hash":
        method |= {"key": upstream.hash_key, "consistent": upstream.consistent}
    elif upstream.method == "random":
        method["two"] = upstream.two
    return method


def _server(group: Group, server: Server, now: float) -> dict[str, object]:
    peer = group.peers[server.key]
    entry: dict[str, object] = {
        "key": server.key,
        "ip": server.ip,
        "port": server.port,
        "weight": server.weight,
        "state": routing_of(server, peer).value,
        "backup": server.backup,
        "max_conns": server.max_conns,
    }
    if server.address != server.key:
        entry["address"] = server.address
    if warmup.active(peer.warm_up):
        policy = group.upstream.policy.warm_up
        entry["warm_up"] = {
            "elapsed_ms": round(warmup.elapsed(peer.warm_up, now) * 1000),
            "duration_ms": round(policy.duration * 1000),
            "curve": policy.curve,
            "floor": policy.floor,
            "starts": policy.starts,
            "held": False,
            "epoch": peer.warm_up.epoch,
        }
    return entry


def _row(group: Group, server: Server) -> tuple[object, ...]:
    """All of a server's entry that, when it changes, must be published: everything but the running clock."""
    peer = group.peers[server.key]
    policy = group.upstream.policy.warm_up
    warming = (peer.warm_up.epoch, policy) if warmup.active(peer.warm_up) else None
    return (replace(server, address="", place=None), routing_of(server, peer), warming)


def _rows(groups: Mapping[str, Group]) -> dict[str, tuple[object, ...]]:
    return {
        name: (_method(group.upstream), group.fail_open, *(_row(group, server) for server in group.upstream.servers))
        for name, group in groups.items()
        if group.upstream.servers
    }
