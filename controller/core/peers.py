"""What happens to one peer: a probe's result, a new wish, a start, the passing of time; and the warm-ups that follow.

A warm-up begins when a server comes into traffic: new, recovered, restarted or undrained. It does not begin because
Headgate or nginx was restarted, or because a configuration was edited elsewhere (HAProxy and Envoy users' complaints).
"""

from __future__ import annotations

from dataclasses import replace

from controller.core import health, table, warmup
from controller.core.events import Effect, Note, PeerSeen, ProbeResult
from controller.core.model import Admin, Group, Health, Peer, State


def probed(state: State, result: ProbeResult, now: float) -> tuple[State, list[Effect]]:
    """Count a probe's result; a verdict that changes is noted, and a server that comes up starts to warm up."""
    group = state.groups.get(result.upstream)
    before = group.peers.get(result.server) if group else None
    if group is None or before is None or before.admin is Admin.MAINT:
        return state, []  # it left, or went under maintenance, while the probe was under way
    reason = f"{result.reason}: {result.detail}" if result.detail else result.reason
    peer = health.observe(before, result.ok, reason, group.upstream.policy.health)
    if peer is before:
        return state, []
    if peer.health is before.health:
        return table.with_peer(state, result.upstream, result.server, peer), []
    if peer.health is Health.UP and not (before.health is Health.UNKNOWN and before.incumbent):
        cause = "recovered" if before.health is Health.DOWN else "new"
        state, peer = _warm(state, group, peer, cause, now)
    state = table.with_peer(state, result.upstream, result.server, peer)
    return state, _health_notes(state, result, peer, group.fail_open)


def set_admin(state: State, upstream: str, key: str, admin: Admin, now: float) -> State:
    """Follow a wish. Back from a drain the server warms up; back from maintenance it is first probed anew."""
    group = state.groups[upstream]
    peer = group.peers[key]
    if peer.admin is admin:
        return state
    if admin is Admin.READY:
        if peer.admin is Admin.MAINT:
            peer = health.forget(peer)
        elif peer.health is Health.UP:
            state, peer = _warm(state, group, peer, "undrained", now)
    return table.with_peer(state, upstream, key, replace(peer, admin=admin, sessions=False))


def drain(state: State, upstream: str, key: str, now: float) -> State:
    """Drain a server; where sessions are sticky it keeps them for now."""
    sticky = bool(state.groups[upstream].upstream.policy.sticky.cookie)
    state = set_admin(state, upstream, key, Admin.DRAIN, now)
    return table.with_peer(state, upstream, key, replace(state.groups[upstream].peers[key], sessions=sticky))


def end_sessions(state: State, upstream: str, key: str) -> State:
    """Let the sessions of a draining server move to others."""
    return table.with_peer(state, upstream, key, replace(state.groups[upstream].peers[key], sessions=False))


def forgiven(peer: Peer) -> Peer:
    """The peer without anything that keeps it away but its health and an operator's wish; nginx forgets as well."""
    return replace(peer, quarantine=(), ejected=None, forgiven=peer.forgiven + 1)


def warm_up(state: State, upstream: str, key: str, cause: str, now: float) -> State:
    """Begin a warm-up anew."""
    group = state.groups[upstream]
    state, peer = _warm(state, group, group.peers[key], cause, now)
    return table.with_peer(state, upstream, key, peer)


def started(state: State, upstream: str, key: str) -> State:
    """A process was started: the server serves once the probes say so. One that serves already goes on."""
    group = state.groups[upstream]
    if key in table.serving(group):
        return state
    return table.with_peer(state, upstream, key, replace(health.forget(group.peers[key]), admin=Admin.READY))


def seen(state: State, reading: PeerSeen, now: float) -> State:
    """Follow nginx's own count of a warm-up."""
    group = state.groups.get(reading.upstream)
    peer = group.peers.get(reading.server) if group else None
    if peer is None:
        return state
    warm = warmup.follow(peer.warm_up, reading.warm_epoch, reading.warm_elapsed, reading.warm_started, now)
    return table.with_peer(
        state, reading.upstream, reading.server, peer if warm is peer.warm_up else replace(peer, warm_up=warm)
    )


def tick(state: State, now: float) -> tuple[State, list[Effect]]:
    """End the warm-ups and quarantines whose time has come."""
    effects: list[Effect] = []
    for name, group in state.groups.items():
        for key, peer in group.peers.items():
            warm = warmup.advance(group.upstream.policy.warm_up, peer.warm_up, now)
            kept = tuple(entry for entry in peer.quarantine if entry.until > now) if peer.quarantine else ()
            if warm is peer.warm_up and len(kept) == len(peer.quarantine):
                continue
            if warm is not peer.warm_up:
                effects.append(Note("warm-up", f"{name}: {key} is warm", name, key))
            state = table.with_peer(state, name, key, replace(peer, warm_up=warm, quarantine=kept))
    return state, effects


def next_expiry(state: State) -> float | None:
    """When the next quarantine ends: each does so by itself, at its own time."""
    return min(
        (entry.until for group in state.groups.values() for peer in group.peers.values() for entry in peer.quarantine),
        default=None,
    )


def _warm(state: State, group: Group, peer: Peer, cause: str, now: float) -> tuple[State, Peer]:
    warm = warmup.begin(group.upstream.policy.warm_up, state.next_epoch, cause, now)
    return replace(state, next_epoch=state.next_epoch + 1), replace(peer, warm_up=warm)


def _health_notes(state: State, result: ProbeResult, peer: Peer, open_before: bool) -> list[Effect]:
    name, key = result.upstream, result.server
    group = state.groups[name]
    count = f"{len(table.serving(group))} of {len(group.upstream.servers)} servers serving"
    if peer.health is Health.UP:
        warming = (
            f", warming up over {group.upstream.policy.warm_up.duration:g} s" if warmup.active(peer.warm_up) else ""
        )
        notes: list[Effect] = [Note("health", f"{name}: {key} is up{warming}; {count}", name, key)]
    else:
        notes = [
            Note("health", f"{name}: {key} is down after {peer.fails} failures ({peer.reason}); {count}", name, key)
        ]
    if group.fail_open and not open_before:
        notes.append(Note("fail-open", f"{name} fails open: no server is up, so those that are down serve", name))
    if open_before and not group.fail_open:
        notes.append(Note("fail-open", f"{name} no longer fails open", name))
    return notes
