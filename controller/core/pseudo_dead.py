"""Servers that only their probes find alive: the path that is probed does not need what the traffic needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controller.core import ejection, table, traffic
from controller.core.events import Effect, Note
from controller.core.model import Health, Peer, Routing, State, Traffic

KIND = "pseudo-dead"
_TRIES = 10  # fewer tell nothing
_FAILED = 0.5  # the share of the tries that failed from which on a server counts as dead


def by_traffic(state: State, name: str, counts: Mapping[str, Traffic], seconds: float) -> tuple[State, list[Effect]]:
    """Note who is up and failed in most of the tries of these last seconds, whether it can be taken out or not.

    It is said once, until tries go well again or the server is another one: it was restarted, or was down meanwhile.
    """
    effects: list[Effect] = []
    for server in state.groups[name].upstream.servers:
        peer, count = state.groups[name].peers[server.key], counts.get(server.key, Traffic())
        ended, rate = traffic.ended(count), traffic.error_rate(count)
        if ended and rate < _FAILED:
            state = _over(state, name, server.key)
        elif ended >= _TRIES and peer.health is Health.UP and table.routing_of(server, peer) is Routing.UP:
            failed = f"{count.errors + count.failures} of {ended} tries in {seconds:.0f} s failed"
            state, more = _say(state, name, server.key, f"{failed}; {table.count(state.groups[name])}")
            effects += more
    return state, effects


def by_probes(state: State, name: str, key: str, before: Peer, peer: Peer) -> tuple[State, list[Effect]]:
    """Note whose probes pass again and again while nginx keeps it away."""
    policy = state.groups[name].upstream.policy
    if peer.ejected is None or peer.health is not Health.UP or not before.passes < peer.passes == policy.health.rise:
        return state, []
    return _say(state, name, key, f"nginx ejected it after {ejection.reason(peer.ejected, policy.outlier)}")


def _say(state: State, name: str, key: str, what: str) -> tuple[State, list[Effect]]:
    group = state.groups[name]
    life = group.peers[key].forgiven
    if group.pseudo_dead.get(key) == life:
        return state, []
    group = replace(group, pseudo_dead={**group.pseudo_dead, key: life})
    note = Note(KIND, f"{name}: {key} is pseudo-dead: its probes pass, and {what}", name, key)
    return replace(state, groups={**state.groups, name: group}), [note]


def _over(state: State, name: str, key: str) -> State:
    group = state.groups[name]
    if key not in group.pseudo_dead:
        return state
    kept = {each: life for each, life in group.pseudo_dead.items() if each != key}
    return replace(state, groups={**state.groups, name: replace(group, pseudo_dead=kept)})
