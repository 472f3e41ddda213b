"""Who warms up, and who waits: a server that comes into traffic begins a ramp where others can carry the load
meanwhile, and waits for its turn where too much of its upstream is cold already.

How one ramp goes stands in warmup.py. Primaries and backups are apart here, for they never share the load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from controller.core import hold, table, warmup
from controller.core.events import Effect, Note
from controller.core.model import Group, Health, Peer, Refused, Routing, Server, State, Warmth, WarmUp

_IN = frozenset({Routing.UP, Routing.WAITING})


def needless(group: Group, server: Server) -> bool:
    """Whether a ramp would be idle: it is switched off, or no other server could take what this one leaves."""
    return group.upstream.policy.warm_up.duration <= 0 or not any(
        other.backup is server.backup and not other.down and other.key != server.key for other in group.upstream.servers
    )


def warm_up(state: State, upstream: str, key: str, cause: str, now: float) -> State:
    """A warm-up of its own epoch for a server that comes into traffic: none, begun, or waiting for its turn."""
    group = state.groups[upstream]
    server, epoch = _server(group, key), state.next_epoch
    if needless(group, server):
        warm = WarmUp(Warmth.NONE, 0.0, now, epoch, cause)
    elif _queue(group, server.backup) or not _room(group, server, now):
        warm = WarmUp(Warmth.QUEUED, 0.0, now, epoch, cause)
    else:
        warm = warmup.begin(group.upstream.policy.warm_up, epoch, cause, now)
    state = replace(state, next_epoch=epoch + 1)
    return table.with_peer(state, upstream, key, replace(group.peers[key], warm_up=warm))


def wished(state: State, upstream: str, key: str, now: float) -> State:
    """A warm-up anew, by hand. Refused where it could not be, or would take the server out of traffic to wait."""
    group = state.groups[upstream]
    server, policy = _server(group, key), group.upstream.policy.warm_up
    if policy.duration <= 0:
        raise Refused(
            "invalid", f"{upstream} has no warm-up", f"set duration in [upstream.{upstream}.warm_up]; a hash has none"
        )
    if needless(group, server):
        raise Refused("invalid", f"no other server of {upstream} could take the load of {key}", "add a server")
    if table.routing_of(server, group.peers[key]) is not Routing.UP:
        raise Refused("invalid", f"{key} gets no traffic now", "it warms up by itself when it does")
    if _queue(group, server.backup) or not _room(group, server, now):
        raise Refused(
            "guard",
            f"as much of {upstream} is cold already as may be",
            f"wait until others are warm, or raise max_cold in [upstream.{upstream}.warm_up]",
        )
    return warm_up(state, upstream, key, "by hand", now)


def ineffective(group: Group) -> bool:
    """Whether every server that gets traffic is warming up: then they share it as if none was."""
    primaries, backups = _load(group, False), _load(group, True)
    load = primaries if primaries.cold or primaries.warm else backups
    return bool(load.cold) and not load.warm


def settle(before: State, state: State, now: float) -> tuple[State, list[Effect]]:
    """What follows for warm-ups from what has happened since `before`.

    Servers that came back into traffic begin to warm up, ramps of those that were taken out of it hold, ramps that have
    become needless end, those who wait are let in as there is room, first come first served, and it is noted where
    ramps protect nobody.
    """
    effects: list[Effect] = []
    for name, group in state.groups.items():
        old = before.groups.get(name)
        if old is group and not _queued(group):
            continue
        reread = old is None or old.upstream is not group.upstream
        if old is not None:
            state = _returned(state, old, name, now)
            for key in _changed(old, state.groups[name]):
                state, more = hold.taken_out(state, old, key, now)
                effects += more
        if reread:
            state, more = _reconsidered(state, name, now)
            effects += more
        if _queued(state.groups[name]):
            state = _admitted(state, name, now)
        if old is not None:
            effects += _notes(old, state.groups[name])
    return state, effects


@dataclass(frozen=True, slots=True)
class _Load:
    """Of the primaries or the backups: what Tally says."""

    well: int
    cold: int
    warm: int


def _load(group: Group, backup: bool) -> _Load:
    tally = group.tally
    if backup:
        return _Load(tally.backup_well, tally.backup_cold, tally.backup_warm)
    return _Load(tally.well, tally.cold, tally.warm)


def _queued(group: Group) -> int:
    return group.tally.queued + group.tally.backup_queued


def _stuck(group: Group, server: Server, now: float) -> bool:
    """Whether others need not wait for this ramp: it has come back to its beginning, or no request came for so long."""
    warm = group.peers[server.key].warm_up
    if table.routing_of(server, group.peers[server.key]) is not Routing.UP:
        return False
    if warm.phase is Warmth.HELD:
        return warm.elapsed <= 0
    return warm.phase is Warmth.WAITING and now - warm.since >= group.upstream.policy.warm_up.duration


def _server(group: Group, key: str) -> Server:
    return next(each for each in group.upstream.servers if each.key == key)


def _room(group: Group, server: Server, now: float) -> bool:
    """Whether this server may warm up now, if it is the first in the queue."""
    load, peer = _load(group, server.backup), group.peers[server.key]
    well, cold, warm = load.well, load.cold, load.warm
    if table.routing_of(server, peer) not in _IN:
        well += server.weight
    elif warmup.ramping(peer.warm_up):
        cold -= server.weight
    elif peer.warm_up.phase is not Warmth.QUEUED and peer.ejected is None:
        warm -= 1
    if not warm or not cold:
        return True
    most = group.upstream.policy.warm_up.max_cold * well - server.weight + 1e-9
    if cold > most:
        tier = (s for s in group.upstream.servers if s.backup is server.backup and s is not server)
        cold -= sum(other.weight for other in tier if _stuck(group, other, now))
    return not cold or cold <= most


def _changed(old: Group, group: Group) -> list[str]:
    """The keys of the servers that were there before and of which something has changed since."""
    if old.upstream is not group.upstream:
        return [key for key in group.peers if key in old.peers]
    return [key for key, peer in group.peers.items() if peer is not old.peers.get(key)]


def _returned(state: State, old: Group, name: str, now: float) -> State:
    group = state.groups[name]
    for key in _changed(old, group):
        server, peer, prior = _server(group, key), group.peers[key], old.peers[key]
        before = server if old.upstream is group.upstream else _server(old, key)
        came_from, routing = table.routing_of(before, prior), table.routing_of(server, peer)
        if peer.warm_up.phase is Warmth.QUEUED and routing is not Routing.WAITING:
            peer = replace(peer, warm_up=replace(peer.warm_up, phase=Warmth.NONE, since=now))
            state = table.with_peer(state, name, key, peer)
        elif routing is Routing.UP and came_from not in _IN and peer.warm_up.epoch == prior.warm_up.epoch:
            state = warm_up(state, name, key, _cause(prior, came_from), now)
    return state


def _cause(prior: Peer, came_from: Routing) -> str:
    if came_from is Routing.DOWN:
        if prior.quarantine:
            return "quarantine ended"
        return "recovered" if prior.health is not Health.UNKNOWN else prior.warm_up.cause or "new"
    return {Routing.QUARANTINE: "quarantine ended", Routing.MAINT: "enabled"}.get(came_from, "undrained")


def _reconsidered(state: State, name: str, now: float) -> tuple[State, list[Effect]]:
    """After the policy or the servers have changed: ramps that became needless, and those that need not wait."""
    effects: list[Effect] = []
    group = state.groups[name]
    policy = group.upstream.policy.warm_up
    for server in group.upstream.servers:
        key, peer = server.key, group.peers[server.key]
        warm = peer.warm_up
        if not warmup.active(warm):
            continue
        if needless(group, server):
            warm = replace(warm, phase=Warmth.DONE, elapsed=warmup.elapsed(warm, now), since=now, why="")
            why = "warm-up is switched off" if policy.duration <= 0 else "no other server shares its load"
            effects.append(Note("warm-up", f"{name}: {key} has its full weight: {why}", name, key))
        elif warm.phase is Warmth.WAITING and policy.starts == "healthy":
            # nginx goes on waiting in a ramp that it knows, so this is another one.
            warm = warmup.begin(policy, state.next_epoch, warm.cause, now)
            state = replace(state, next_epoch=state.next_epoch + 1)
        else:
            continue
        state = table.with_peer(state, name, key, replace(peer, warm_up=warm))
    return state, effects


def _admitted(state: State, name: str, now: float) -> State:
    policy = state.groups[name].upstream.policy.warm_up
    for backup in (False, True):
        for server in _queue(state.groups[name], backup):
            group = state.groups[name]
            if not _room(group, server, now):
                break
            peer = group.peers[server.key]
            warm = warmup.begin(policy, peer.warm_up.epoch, peer.warm_up.cause, now)
            state = table.with_peer(state, name, server.key, replace(peer, warm_up=warm))
    return state


def _queue(group: Group, backup: bool) -> list[Server]:
    peers = group.peers
    waiting = (s for s in group.upstream.servers if peers[s.key].warm_up.phase is Warmth.QUEUED)
    return sorted((s for s in waiting if s.backup is backup), key=lambda s: peers[s.key].warm_up.epoch)


def _notes(old: Group, group: Group) -> list[Effect]:
    name, policy = group.upstream.name, group.upstream.policy.warm_up
    notes: list[Effect] = []
    for key in _changed(old, group):
        warm, prior = group.peers[key].warm_up, old.peers[key]
        # One that goes on in another epoch (step.py) has begun before.
        begun = (warm.epoch != prior.warm_up.epoch and not warm.elapsed) or prior.warm_up.phase is Warmth.QUEUED
        if begun and warm.phase is Warmth.QUEUED:
            load = _load(group, _server(group, key).backup)
            part = f"{load.cold / load.well * 100:.0f} %"
            text = f"{name}: {key} waits: {part} of {name} is cold already; {table.count(group)}"
            notes.append(Note("warm-up", text, name, key))
        elif begun and warmup.ramping(warm):
            when = "" if warm.phase is Warmth.RUNNING else " from its first request on"
            text = f"{name}: {key} warms up over {policy.duration:g} s{when} ({warm.cause})"
            notes.append(Note("warm-up", text, name, key))
    cold = ineffective(group)
    if cold is not ineffective(old):
        if cold:
            notes.append(Note("warm-up", f"ramp ineffective: no warm server in {name}", name))
        elif table.serves(group):
            notes.append(Note("warm-up", f"{name}: ramps are effective again: a warm server serves", name))
    return notes
