"""From State to the routing table that nginx serves: effective states and weights, fail open, revisions.

The JSON shape is the contract with lua/headgate/table.lua; tests/fixtures/tables holds examples for both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace

from controller.core import warmup
from controller.core.model import Admin, Group, Health, Peer, Quarantine, Routing, Server, State, Tally, Upstream

FORMAT = 1


def routing_of(server: Server, peer: Peer) -> Routing:
    """A peer's state for the balancer: what people and the server itself want comes first, then health.

    A server that flaps or is an outlier counts as down, so that it serves where the upstream fails open; a notice that
    it goes offline holds also then.
    """
    if server.down or Admin.MAINT in (peer.admin, peer.agent.admin):
        return Routing.MAINT
    if peer.admin is Admin.DRAIN:
        return Routing.SESSIONS if peer.sessions else Routing.DRAIN
    if peer.agent.admin is Admin.DRAIN or peer.agent.weight <= 0:
        return Routing.DRAIN
    if peer.quarantine and not all(map(judged, peer.quarantine)):
        return Routing.QUARANTINE
    if peer.quarantine or peer.agent.down:
        return Routing.DOWN
    if peer.health is Health.UP or (peer.health is Health.UNKNOWN and peer.incumbent):
        return Routing.UP
    return Routing.DOWN


def judged(entry: Quarantine) -> bool:
    """Whether a quarantine is a judgement of ours, and no notice by which the server goes offline."""
    return entry.kind in ("flapping", "outlier")


def serving(group: Group, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The keys of the servers that get traffic by their own right (not by failing open), `without` some."""
    left_out = frozenset(without)
    return tuple(
        server.key
        for server in group.upstream.servers
        if server.key not in left_out and _serves(server, group.peers[server.key])
    )


def serves(group: Group, without: str = "") -> bool:
    """Whether any server does, `without` one."""
    left_out = without and _serves(_server_of(group, without), group.peers[without])
    return group.tally.serving > (1 if left_out else 0)


def count(group: Group) -> str:
    """How many serve, as a phrase: `2 of 3 servers serving`."""
    return f"{group.tally.serving} of {len(group.upstream.servers)} servers serving"


def effective_weight(group: Group, server: Server, now: float) -> float:
    """What the balancer reckons with: 0 where the server is not picked, else weight times its warm-up share."""
    peer = group.peers[server.key]
    if _serves(server, peer) or (group.fail_open and routing_of(server, peer) in (Routing.UP, Routing.DOWN)):
        return _weight(server, peer) * warmup.share(group.upstream.policy.warm_up, peer.warm_up, now)
    return 0.0


def with_peer(state: State, upstream: str, key: str, peer: Peer) -> State:
    """The state with this peer in place of the old one; a new revision only where the routing table changes by it."""
    group = state.groups[upstream]
    before = group.peers[key]
    if peer is before:
        return state
    changed = replace(group, peers={**group.peers, key: peer})
    server = _server_of(group, key)
    was, now = _tally(server, before), _tally(server, peer)
    if was != now:
        parts = zip(astuple(group.tally), was, now, strict=True)
        changed = replace(changed, tally=Tally(*(total - old + new for total, old, new in parts)))
        changed = replace(changed, fail_open=fails_open(changed))
    differs = changed.fail_open != group.fail_open or _row(changed, server) != _row(group, server)
    return replace(
        state,
        groups={**state.groups, upstream: changed},
        revision=state.revision + 1 if differs else state.revision,
    )


def with_groups(state: State, groups: Mapping[str, Group]) -> State:
    """The state with these groups, after a configuration was read; a new revision only where the table changes."""
    groups = {name: replace(group, tally=tally(group)) for name, group in groups.items()}
    groups = {name: replace(group, fail_open=fails_open(group)) for name, group in groups.items()}
    differs = _rows(groups) != _rows(state.groups)
    return replace(state, groups=groups, revision=state.revision + 1 if differs else state.revision)


def fails_open(group: Group) -> bool:
    """No server serves, or of the primary ones fewer than the share `health.panic` are up, and health is to blame.

    Then health and ejections are ignored: those that are down serve, for one of them may be well. Where no primary one
    is up and a backup is, that one serves instead.
    """
    tally = group.tally
    if not tally.serving:
        return tally.able > 0
    return 0 < tally.up < group.upstream.policy.health.panic * tally.wanted


def tally(group: Group) -> Tally:
    """Count the servers anew; `with_peer` then keeps the numbers, so that a burst of verdicts costs little."""
    counts = [_tally(server, group.peers[server.key]) for server in group.upstream.servers]
    return Tally(*map(sum, zip(*counts, strict=True)))


def _tally(server: Server, peer: Peer) -> tuple[bool, bool, bool, bool]:
    """What one server adds to a Tally."""
    routing = routing_of(server, peer)
    able = routing in (Routing.UP, Routing.DOWN)
    up = routing in (Routing.UP, Routing.WAITING)
    primary = not server.backup
    return _serves(server, peer), able, primary and (up or able), primary and up


def _serves(server: Server, peer: Peer) -> bool:
    return peer.ejected is None and routing_of(server, peer) is Routing.UP


def _server_of(group: Group, key: str) -> Server:
    return next(server for server in group.upstream.servers if server.key == key)


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
        "weight": _weight(server, peer),
        "state": routing_of(server, peer).value,
        "backup": server.backup,
        "max_conns": peer.agent.max_conns or server.max_conns,
    }
    if peer.forgiven:
        entry["forgive"] = peer.forgiven
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
    said = (peer.agent.weight, peer.agent.max_conns)
    return (replace(server, address="", place=None), routing_of(server, peer), warming, said, peer.forgiven)


def _weight(server: Server, peer: Peer) -> float:
    """The configured weight, scaled by the load that the server reports. One that wants none drains by its state."""
    factor = peer.agent.weight
    return server.weight if factor == 1.0 or factor <= 0 else server.weight * factor


def _rows(groups: Mapping[str, Group]) -> dict[str, tuple[object, ...]]:
    return {
        name: (_method(group.upstream), group.fail_open, *(_row(group, server) for server in group.upstream.servers))
        for name, group in groups.items()
        if group.upstream.servers
    }
