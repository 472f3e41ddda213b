"""From State to the routing table that nginx serves: effective states and weights, fail open, revisions.

The JSON shape is the contract with lua/headgate/table.lua; tests/fixtures/tables holds examples for both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace

from controller.core import warmup
from controller.core.model import (
    Admin,
    Group,
    Health,
    Peer,
    Quarantine,
    Routing,
    Server,
    State,
    Tally,
    Upstream,
    Warmth,
)

FORMAT = 1
MOST_CONNS = 2**31
"""More connections than any nginx holds. Its own limit for `max_conns` is greater."""


def routing_of(server: Server, peer: Peer) -> Routing:
    """A peer's state for the balancer: what people and the server itself want comes first, then health.

    A server that flaps or is an outlier counts as down, so that it serves where the upstream fails open; a notice that
    it goes offline holds also then.
    """
    if server.down or Admin.MAINT in (peer.admin, peer.agent.admin):
        return Routing.MAINT
    if peer.held:
        return Routing.DRAIN
    if peer.admin is Admin.DRAIN:
        return Routing.SESSIONS if peer.sessions else Routing.DRAIN
    if peer.agent.admin is Admin.DRAIN or peer.agent.weight <= 0:
        return Routing.DRAIN
    if peer.quarantine and not all(map(judged, peer.quarantine)):
        return Routing.QUARANTINE
    if peer.quarantine or peer.agent.down:
        return Routing.DOWN
    if peer.health is Health.UP or (peer.health is Health.UNKNOWN and peer.incumbent):
        return Routing.WAITING if peer.warm_up.phase is Warmth.QUEUED else Routing.UP
    return Routing.DOWN


def is_outlier(peer: Peer) -> bool:
    """Whether it is away as an outlier: nginx counts it with those that it ejects itself."""
    return any(entry.kind == "outlier" for entry in peer.quarantine)


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


def in_traffic(group: Group, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The keys of the servers that get traffic, `without` some: by their own right, or where none does by failing
    open."""
    left_out = frozenset(without)
    if group.tally.serving:
        return serving(group, left_out)
    able = (s.key for s in group.upstream.servers if routing_of(s, group.peers[s.key]) in (Routing.UP, Routing.DOWN))
    return tuple(key for key in able if key not in left_out)


def serves(group: Group, without: str = "") -> bool:
    """Whether any server does, `without` one."""
    left_out = without and _serves(_server_of(group, without), group.peers[without])
    return group.tally.serving > (1 if left_out else 0)


def count(group: Group) -> str:
    """How many serve, as a phrase: `2 of 3 servers serving`."""
    return f"{group.tally.serving} of {len(group.upstream.servers)} servers serving"


def effective_weight(group: Group, server: Server, now: float) -> float:
    """What the balancer reckons with, in 0..weight; of many servers ask `effective_weights`."""
    return effective_weights(group, now)[server.key]


def effective_weights(group: Group, now: float) -> dict[str, float]:
    """By key: 0 where a server is not picked, else its weight times its warm-up share.

    Where all that are picked warm up, their shares count in proportion to the largest, for together they carry all of
    the load. Backups are apart from primaries.
    """
    policy = group.upstream.policy.warm_up
    shares: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for server in group.upstream.servers:
        peer = group.peers[server.key]
        if _serves(server, peer) or (group.fail_open and routing_of(server, peer) in (Routing.UP, Routing.DOWN)):
            shares[server.backup][server.key] = warmup.share(policy, peer.warm_up, now)
    base = {backup: max(each.values(), default=1.0) for backup, each in shares.items()}
    return {
        server.key: _weight(server, group.peers[server.key])
        * shares[server.backup].get(server.key, 0.0)
        / base[server.backup]
        for server in group.upstream.servers
    }


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


def _tally(server: Server, peer: Peer) -> tuple[int, ...]:
    """What one server adds to a Tally."""
    routing = routing_of(server, peer)
    able = routing in (Routing.UP, Routing.DOWN)
    up = routing in (Routing.UP, Routing.WAITING)
    primary = not server.backup
    ramps = routing is Routing.UP and warmup.ramping(peer.warm_up)
    serves = _serves(server, peer)
    load = (server.weight * up, server.weight * ramps, serves and not ramps, routing is Routing.WAITING)
    tiers = (*load, 0, 0, 0, 0) if primary else (0, 0, 0, 0, *load)
    return (serves, able, primary and (up or able), primary and up, *tiers)


def _serves(server: Server, peer: Peer) -> bool:
    return peer.ejected is None and routing_of(server, peer) is Routing.UP


def _server_of(group: Group, key: str) -> Server:
    return next(server for server in group.upstream.servers if server.key == key)


def table(state: State, now: float) -> dict[str, object]:
    """The whole table as JSON: `{"format", "revision", "upstreams": {NAME: {"method", "fail_open", "servers"}}}`.

    Beside `method` stands what belongs to it: `key`, `consistent` and `bound` for hash, `two` for random; and, where
    they are on, `sticky`, `ignore_paths`, `outlier` and `quarantine_ms` (docs/data-plane.md).

    An upstream without servers is left out: nginx then balances it by itself.
    """
    return {
        "format": FORMAT,
        "revision": state.revision,
        "upstreams": {
            name: {
                **_upstream(group.upstream),
                "fail_open": group.fail_open,
                "servers": [_server(group, server, now) for server in group.upstream.servers],
            }
            for name, group in state.groups.items()
            if group.upstream.servers
        },
    }


def method_of(upstream: Upstream) -> str:
    """The balancing method in force: headgate.toml's where it names one, else nginx.conf's."""
    return upstream.policy.balance.method or upstream.method


def places(upstream: Upstream) -> bool:
    """Whether the weights of all servers place the clients, so that a ramp would move other servers' clients: with a
    hash, unless its load is bounded, for then a server that warms up takes its own clients up to its share."""
    method = _method(upstream)
    return method["method"] in ("hash", "ip_hash") and "bound" not in method


def _method(upstream: Upstream) -> dict[str, object]:
    balance, name = upstream.policy.balance, method_of(upstream)
    method: dict[str, object] = {"method": name}
    if name == "hash":
        key, consistent = upstream.hash_key, upstream.consistent
        if balance.method:
            key, consistent = balance.key, balance.consistent
        method |= {"key": key, "consistent": consistent}
        if consistent and balance.bound:
            method["bound"] = balance.bound
    elif name == "random":
        method["two"] = balance.two if balance.method else upstream.two
    return method


def _upstream(upstream: Upstream) -> dict[str, object]:
    """All of an upstream's entry but its servers and whether it fails open."""
    entry, policy = _method(upstream), upstream.policy
    outlier, sticky = policy.outlier, policy.sticky
    if sticky.cookie:
        fields = ("cookie", "path", "secure", "http_only", "same_site", "max_age")
        entry["sticky"] = {name: getattr(sticky, name) for name in fields}
    if policy.warm_up.ignore_paths:
        entry["ignore_paths"] = list(policy.warm_up.ignore_paths)
    if outlier.errors or outlier.timeouts or outlier.server_errors:
        entry["outlier"] = {
            "errors": outlier.errors,
            "timeouts": outlier.timeouts,
            "server_errors": outlier.server_errors,
            "base_ms": _ms(outlier.base),
            "cap_ms": _ms(outlier.cap),
            "max_ejected": outlier.max_ejected,
        }
    if policy.quarantine.marks:
        entry["quarantine_ms"] = _ms(policy.quarantine.duration)
    return entry


def _server(group: Group, server: Server, now: float) -> dict[str, object]:
    peer, policy = group.peers[server.key], group.upstream.policy.warm_up
    entry: dict[str, object] = {
        "key": server.key,
        "ip": server.ip,
        "port": server.port,
        "weight": _weight(server, peer),
        "state": routing_of(server, peer).value,
        "backup": server.backup,
        "max_conns": min(peer.agent.max_conns or server.max_conns, MOST_CONNS),
    }
    if peer.forgiven:
        entry["forgive"] = peer.forgiven
    if is_outlier(peer):
        entry["outlier"] = True
    if server.address != server.key:
        entry["address"] = server.address
    if warmup.ramping(peer.warm_up):
        # At 0 nginx would wait for a first request.
        least = 1 if peer.warm_up.phase is not Warmth.WAITING and policy.starts == "first-request" else 0
        entry["warm_up"] = {"elapsed_ms": max(least, _ms(warmup.elapsed(peer.warm_up, now))), **_ramp(group, peer)}
    return entry


def _ramp(group: Group, peer: Peer) -> dict[str, object]:
    """All of a warm-up's entry but the running clock."""
    policy, warm = group.upstream.policy.warm_up, peer.warm_up
    entry: dict[str, object] = {
        "duration_ms": _ms(policy.duration),
        "curve": policy.curve,
        "floor": policy.floor,
        "starts": policy.starts,
        "held": warm.phase is Warmth.HELD,
        "epoch": warm.epoch,
    }
    return entry | {"steps": policy.steps} if policy.steps else entry


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _row(group: Group, server: Server) -> tuple[object, ...]:
    """All of a server's entry that, when it changes, must be published: everything but the running clock."""
    peer = group.peers[server.key]
    warm = peer.warm_up
    ramp = _ramp(group, peer) if warmup.ramping(warm) else None
    held = warm.elapsed if warm.phase is Warmth.HELD else None
    begun = warm.phase is not Warmth.WAITING  # nginx found it by itself, and its successor must not wait again
    said = (peer.agent.weight, peer.agent.max_conns, is_outlier(peer))
    return (replace(server, address="", place=None), routing_of(server, peer), ramp, held, begun, said, peer.forgiven)


def _weight(server: Server, peer: Peer) -> float:
    """The configured weight, scaled by the load that the server reports. One that wants none drains by its state."""
    factor = peer.agent.weight
    return server.weight if factor == 1.0 or factor <= 0 else server.weight * factor


def _rows(groups: Mapping[str, Group]) -> dict[str, tuple[object, ...]]:
    return {
        name: (_upstream(group.upstream), group.fail_open, *(_row(group, server) for server in group.upstream.servers))
        for name, group in groups.items()
        if group.upstream.servers
    }
