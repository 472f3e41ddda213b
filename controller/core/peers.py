"""What happens to one peer: a probe's result, its own words, a new wish, a start, the passing of time.

The warm-up of a server that comes into traffic by it begins in cold.py.
"""

from __future__ import annotations

from dataclasses import replace

from controller.core import accrual, agent, ejection, flapping, health, hold, pseudo_dead, table, warmup
from controller.core.events import AgentSaid, Effect, Note, PeerSeen, ProbeResult
from controller.core.model import Admin, Agent, Group, Health, Peer, Routing, State, Warmth


def probed(state: State, result: ProbeResult, now: float) -> tuple[State, list[Effect]]:
    """Count a probe's result; a verdict that changes is noted."""
    group = state.groups.get(result.upstream)
    before = group.peers.get(result.server) if group else None
    if group is None or before is None or before.admin is Admin.MAINT:
        return state, []  # it left, or went under maintenance, while the probe was under way
    reason = f"{result.reason}: {result.detail}" if result.detail else result.reason
    policy = group.upstream.policy.health
    suspects, name = policy.detector == "accrual", (result.upstream, result.server)
    phi = accrual.suspicion(state.heartbeats.get(name, ()), now) if suspects and not result.ok else None
    peer = health.observe(before, result.ok, reason, policy, phi)
    if suspects and result.ok and peer.health is Health.UP:
        known = state.heartbeats.get(name, ()) if before.health is Health.UP else ()
        state = replace(state, heartbeats={**state.heartbeats, name: accrual.beat(known, now)})
    if peer is before:
        return state, []
    if peer.health is before.health:
        state = table.with_peer(state, result.upstream, result.server, peer)
        return pseudo_dead.by_probes(state, result.upstream, result.server, before, peer)
    after = f"after {peer.fails} failures" if phi is None else f"with phi {phi:.1f}"
    return _turned(state, result.upstream, result.server, peer, after, now)


def agent_said(state: State, event: AgentSaid, now: float) -> tuple[State, list[Effect]]:
    """Follow a backend's own words. A change of its load alone is no event."""
    name, key = event.upstream, event.server
    group = state.groups.get(name)
    before = group.peers.get(key) if group else None
    if group is None or before is None:
        return state, []
    said, unknown = agent.said(before.agent, event.words)
    effects: list[Effect] = []
    if unknown:
        effects.append(
            Note("agent", f"{name}: the agent of {key} says what nobody knows: {' '.join(unknown)}", name, key)
        )
    if said == before.agent:
        return state, effects
    peer = replace(before, agent=said)
    if bool(said.down) is not bool(before.agent.down) and peer.health is Health.UP:
        peer, notes = _damped(group, key, peer, now)
        effects += notes
    state = table.with_peer(state, name, key, peer)
    if (said.admin, said.down, said.max_conns, said.weight <= 0) != (
        before.agent.admin,
        before.agent.down,
        before.agent.max_conns,
        before.agent.weight <= 0,
    ):
        text = f"{name}: {key} says of itself: {agent.describe(said)}; {table.count(state.groups[name])}"
        effects.insert(0, Note("agent", text, name, key))
    return state, effects


def set_admin(state: State, upstream: str, key: str, admin: Admin, now: float) -> State:
    """Follow a wish. Back from maintenance the server is first probed anew."""
    group = state.groups[upstream]
    peer = group.peers[key]
    if peer.admin is admin:
        return state
    if admin is Admin.READY and peer.admin is Admin.MAINT:
        peer = health.forget(peer, "enabled")
    return table.with_peer(state, upstream, key, replace(peer, admin=admin, sessions=False))


def drain(state: State, upstream: str, key: str, now: float) -> State:
    """Drain a server; where sessions are sticky it keeps them for now."""
    sticky = bool(state.groups[upstream].upstream.policy.sticky.cookie)
    state = set_admin(state, upstream, key, Admin.DRAIN, now)
    return table.with_peer(state, upstream, key, replace(state.groups[upstream].peers[key], sessions=sticky))


def end_sessions(state: State, upstream: str, key: str) -> State:
    """Let the sessions of a draining server move to others."""
    return table.with_peer(state, upstream, key, replace(state.groups[upstream].peers[key], sessions=False))


def started(state: State, upstream: str, key: str) -> tuple[State, list[Effect]]:
    """A process was started: the server serves once the probes say so. One that serves already goes on."""
    group = state.groups[upstream]
    if key in table.serving(group):
        return state, []
    before = group.peers[key]
    peer = ejection.forgive(before)
    notes = ejection.forgiven(upstream, key, before, peer, "it was started anew")
    return table.with_peer(state, upstream, key, replace(health.forget(peer), admin=Admin.READY, held=0)), notes


def pardon(state: State, upstream: str, key: str) -> tuple[State, list[Effect]]:
    """An operator wants the server to serve: whatever it was sent away for is forgotten."""
    before = state.groups[upstream].peers[key]
    peer = replace(ejection.forgive(before, everything=True), held=0)
    return table.with_peer(state, upstream, key, peer), ejection.forgiven(upstream, key, before, peer, "it was enabled")


def reset(state: State, upstream: str, key: str) -> tuple[State, list[str]]:
    """Forget all that is held against a server whose process has ended, and have it ready; what that was, in words.

    It serves once its new process is found well. The ids of notices stay, for a late repetition means the old one.
    """
    before = state.groups[upstream].peers[key]
    forgot = [f"a quarantine ({entry.kind}: {entry.why})" for entry in before.quarantine]
    if before.ejected or before.ejections:
        forgot.append("ejections")
    if before.changed or before.rests:
        forgot.append("its changes of health")
    if before.agent != Agent():
        forgot.append("what its agent said")
    peer = replace(ejection.forgive(before, everything=True), agent=Agent(), admin=Admin.READY, sessions=False)
    return table.with_peer(state, upstream, key, health.forget(peer)), forgot


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
    """End the warm-ups, quarantines and ejections whose time has come, and suspect who is silent for too long."""
    effects: list[Effect] = []
    for name, group in state.groups.items():
        for server in group.upstream.servers:
            key, peer = server.key, group.peers[server.key]
            warm = warmup.advance(group.upstream.policy.warm_up, hold.unjudged(group, key, now), now)
            if warm is not peer.warm_up:
                state = table.with_peer(state, name, key, replace(peer, warm_up=warm))
                if table.routing_of(server, peer) is Routing.UP:
                    outcome = "is warm" if warm.phase is Warmth.DONE else "goes on to warm up: nobody could judge it"
                    effects.append(Note("warm-up", f"{name}: {key} {outcome}", name, key))
            if peer.quarantine or peer.ejected:
                state, more = _expire(state, name, key, now)
                effects += more
            if peer.fails and group.upstream.policy.health.detector == "accrual":
                state, more = _suspect(state, name, key, now)
                effects += more
    return state, effects


def next_expiry(state: State) -> float | None:
    """When the next quarantine ends: each does so by itself, at its own time."""
    return min(
        (entry.until for group in state.groups.values() for peer in group.peers.values() for entry in peer.quarantine),
        default=None,
    )


def _expire(state: State, name: str, key: str, now: float) -> tuple[State, list[Effect]]:
    before = state.groups[name].peers[key]
    over = [entry for entry in before.quarantine if entry.until <= now]
    peer = before
    if over:
        peer = replace(peer, quarantine=tuple(entry for entry in peer.quarantine if entry.until > now))
    if flapping.resting(before) and not flapping.resting(peer):
        peer = replace(peer, changed=(now,))
    ejected = peer.ejected is not None and peer.ejected.until <= now
    if ejected:
        peer = replace(peer, ejected=None)
    state = table.with_peer(state, name, key, peer)
    group = state.groups[name]
    notes: list[Effect] = [
        Note(
            entry.kind if table.judged(entry) else "quarantine",
            f"{name}: {key} has been away long enough ({entry.why}); {table.count(group)}",
            name,
            key,
        )
        for entry in over
    ]
    return state, [*notes, ejection.ended(group, key)] if ejected else notes


def _suspect(state: State, name: str, key: str, now: float) -> tuple[State, list[Effect]]:
    peer, policy = state.groups[name].peers[key], state.groups[name].upstream.policy.health
    phi = accrual.suspicion(state.heartbeats.get((name, key), ()), now)
    if peer.health is not Health.UP or phi is None or phi < policy.phi:
        return state, []
    return _turned(state, name, key, replace(peer, health=Health.DOWN), f"with phi {phi:.1f}", now)


def _turned(state: State, name: str, key: str, peer: Peer, after: str, now: float) -> tuple[State, list[Effect]]:
    """The verdict on a peer has changed: damp it, forgive it, and say so."""
    group = state.groups[name]
    before = group.peers[key]
    effects: list[Effect] = []
    if before.health is not Health.UNKNOWN and peer.admin is Admin.READY and not (peer.agent.down or peer.held):
        peer, effects = _damped(group, key, peer, now)
    if peer.health is Health.UP and before.health is Health.DOWN and not flapping.resting(peer):
        old, peer = peer, ejection.forgive(peer)
        effects += ejection.forgiven(name, key, old, peer, "it was down and is up again")
    state = table.with_peer(state, name, key, peer)
    if not flapping.resting(before):
        effects.insert(0, _health_note(state.groups[name], key, after))
    return state, effects


def _damped(group: Group, key: str, peer: Peer, now: float) -> tuple[Peer, list[Effect]]:
    """Count a change of health; who flaps rests, unless no other server serves."""
    name, policy = group.upstream.name, group.upstream.policy.health
    rested, before = flapping.resting(peer), peer
    peer = flapping.count(peer, policy, now)
    if not flapping.too_often(peer, policy):
        return peer, []
    times = f"{len(peer.changed)} times within {policy.flap_window:g} s"
    if rested or table.serves(group, without=key):
        peer = flapping.rest(peer, policy, now)
        text = f"it changed {times} and rests for {peer.quarantine[-1].until - now:g} s"
    else:
        rested = flapping.too_often(before, policy)  # was said before
        text = f"it changed {times}, but no other server serves, so it stays"
    return peer, [] if rested else [Note(flapping.KIND, f"{name}: {key} flaps: {text}", name, key)]


def _health_note(group: Group, key: str, after: str) -> Note:
    name, peer = group.upstream.name, group.peers[key]
    if peer.health is Health.UP:
        return Note("health", f"{name}: {key} is up; {table.count(group)}", name, key)
    return Note("health", f"{name}: {key} is down {after} ({peer.reason}); {table.count(group)}", name, key)
