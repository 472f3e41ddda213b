"""Which upstreams and servers there are: nginx.conf joined with what lives, and what it has just lost.

A file that is moved or written in several pieces looks for a moment as if its servers were gone. So an upstream that is
nowhere any more stays for LINGER seconds as it was, and a server that comes back within them is what it was to
operators: under maintenance, drained, in quarantine. It is probed anew.
"""

from __future__ import annotations

from dataclasses import replace

from controller.core import change, health, shared, table
from controller.core.events import ConfigRead, Effect, Note
from controller.core.model import Agent, Departed, Group, Peer, State, Upstream, WarmUp

LINGER = 60.0
"""Seconds for which what has left nginx.conf is remembered."""

_SILENT = Agent()


def read(state: State, event: ConfigRead, now: float) -> tuple[State, list[Effect]]:
    """Follow a configuration. With the first one go on the steps that were under way when the daemon ended."""
    effects: list[Effect] = []
    if state.config_error:
        effects.append(Note("config", "the nginx configuration can be read again"))
    first = not state.configured
    groups = {upstream.name: _join(state, upstream) for upstream in event.upstreams}
    for name, group in groups.items():
        old = state.groups[name].peers if name in state.groups else {}
        if not first:
            for key in group.peers.keys() - old.keys():
                effects.append(Note("config", f"{name}: {key} is new in nginx.conf", name, key))
            for key in old.keys() - group.peers.keys():
                effects.append(Note("config", f"{name}: {key} is gone from nginx.conf", name, key))
    for name, group in state.groups.items():
        if name in groups:
            continue
        if name in event.released:
            effects.append(Note("config", f"upstream {name} has lost its hook", name))
        else:
            groups[name] = group if group.gone is not None else replace(group, gone=now)
            if group.gone is None:
                text = f"upstream {name} is gone from nginx.conf; it stays for {LINGER:g} s in case it comes back"
                effects.append(Note("config", text, name))
    state = replace(_with_groups(state, groups, now), config_error="", configured=True, stored={}, heartbeats={})
    state = shared.hold_new(state)
    return state, effects + (change.resume(state) if first else [])


def expire(state: State, now: float) -> tuple[State, list[Effect]]:
    """Let go of what left nginx.conf LINGER seconds ago."""
    over = [name for name, group in state.groups.items() if group.gone is not None and now - group.gone >= LINGER]
    if over:
        state = _with_groups(state, {name: each for name, each in state.groups.items() if name not in over}, now)
    if any(now - each.at >= LINGER for each in state.departed.values()):
        kept = {name: each for name, each in state.departed.items() if now - each.at < LINGER}
        state = replace(state, departed=kept)
    return state, [Note("config", f"upstream {name} is not managed any more", name) for name in over]


def _with_groups(state: State, groups: dict[str, Group], now: float) -> State:
    """The state with these groups; servers that are in none of them any more have departed."""
    known = {(name, key): peer for name, group in state.groups.items() for key, peer in group.peers.items()}
    there = {(name, key) for name, group in groups.items() for key in group.peers}
    lost = {name: Departed(peer, now) for name, peer in {**state.stored, **known}.items() if name not in there}
    departed = {name: each for name, each in {**state.departed, **lost}.items() if name not in there}
    return replace(table.with_groups(state, groups), departed=departed)


def _join(state: State, upstream: Upstream) -> Group:
    """Configuration and living peers, joined by key.

    A server that is not known is new, and serves when the probes say so; but where nothing at all is known of its
    upstream, nginx has been sending to it before Headgate came, and goes on doing so.
    """
    group = state.groups.get(upstream.name, Group(upstream, {}))
    if upstream.name in state.groups:
        known = dict(group.peers)
    else:
        known = {key: peer for (name, key), peer in state.stored.items() if name == upstream.name}
    left = {key: each.peer for (name, key), each in state.departed.items() if name == upstream.name}
    newcomer = Peer(incumbent=not known and not left)
    peers = {
        server.key: known.get(server.key) or _returning(left.get(server.key)) or newcomer for server in upstream.servers
    }
    if not upstream.policy.health.agent:
        peers = {k: p if p.agent == _SILENT else replace(p, agent=_SILENT) for k, p in peers.items()}
    return replace(group, upstream=upstream, peers=peers, gone=None)


def _returning(peer: Peer | None) -> Peer | None:
    """What a server is when it is back in nginx.conf: to operators what it was, to the probes a new one."""
    return peer and replace(health.forget(peer), warm_up=WarmUp())
