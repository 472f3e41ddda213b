"""Panic: too few servers of an upstream are up, so their health is ignored; when it begins and ends, and who is spared.

When it holds is `fails_open` in table.py, for it is a part of the routing table.
"""

from __future__ import annotations

from dataclasses import replace

from controller.core import table
from controller.core.events import Effect, Note
from controller.core.model import Group, Health, Routing, State

KIND = "fail-open"


def watch(before: State, state: State) -> tuple[State, list[Effect]]:
    """What follows for upstreams that fail open: notes at begin and end; and before dead servers get all the traffic,
    those that are well and only rest, or are outliers, come back early."""
    effects: list[Effect] = []
    if state.groups is before.groups:
        return state, effects
    for name, group in state.groups.items():
        old = before.groups.get(name)
        if group is old:
            continue
        if group.fail_open and not table.serves(group):
            state, more = _spare(state, name)
            effects += more
            group = state.groups[name]
        was_open = old is not None and old.fail_open
        if group.fail_open and not was_open:
            effects.append(Note(KIND, f"{name} fails open: {_why(group)}", name))
        elif was_open and not group.fail_open:
            effects.append(Note(KIND, f"{name} no longer fails open: {table.count(group)}", name))
    return state, effects


def _spare(state: State, name: str) -> tuple[State, list[Effect]]:
    """Bring back the servers that are up and were merely judged: all of them, for one alone would have all the load."""
    group = state.groups[name]
    effects: list[Effect] = []
    for server in group.upstream.servers:
        peer = group.peers[server.key]
        if not peer.quarantine or peer.health is not Health.UP:
            continue
        free = replace(peer, quarantine=tuple(entry for entry in peer.quarantine if not table.judged(entry)))
        if table.routing_of(server, free) is Routing.UP:
            state = table.with_peer(state, name, server.key, free)
            text = f"{name}: {server.key} comes back early, for no other server serves"
            effects.append(Note(peer.quarantine[0].kind, text, name, server.key))
    return state, effects


def _why(group: Group) -> str:
    if not group.tally.serving:
        return "no server is up, so those that are down serve"
    share = f"fewer than {100 * group.upstream.policy.health.panic:g} %"
    return f"{group.tally.up} of {group.tally.wanted} servers are up, {share}, so all of them serve"
