"""Up, warming, and never picked, though nginx promises a first pick in ceil(1 / s) picks of an upstream to a share s.

Where a key or a cookie decides it promises nothing, nor does it to backups.
"""

from __future__ import annotations

import math
from dataclasses import replace

from controller.core import table, warmup
from controller.core.events import Effect, Note, TrafficSeen
from controller.core.model import Group, Routing, Server, State, Unpicked


def watch(state: State, seen: TrafficSeen, now: float) -> tuple[State, list[Effect]]:
    """Note a server that was not picked in time, once for each of its warm-ups."""
    group = state.groups.get(seen.upstream)
    if group is None:
        return state, []
    waiting = [server.key for server in group.upstream.servers if _waits(group, server, seen)]
    if not waiting and not group.unpicked:
        return state, []
    picks = sum(each.requests for each in seen.servers.values())
    weights = table.effective_weights(group, now)
    effects: list[Effect] = []
    unpicked = {}
    for key in waiting:
        epoch, known = group.peers[key].warm_up.epoch, group.unpicked.get(key)
        if known is None or (known.epoch, known.boot) != (epoch, seen.boot) or picks < known.picks:
            known = Unpicked(epoch, seen.boot, picks)
        # Another one that waits may come first, and cost one pick.
        due = first_pick(group, weights, key) + len(waiting) - 1
        if not known.said and picks - known.picks >= due:
            text = (
                f"{key} is up and warms up, but was never picked in {picks - known.picks} requests; it was due in {due}"
            )
            effects.append(Note("warm-up", f"{seen.upstream}: {text}", seen.upstream, key))
            known = replace(known, said=True)
        unpicked[key] = known
    if unpicked == group.unpicked:
        return state, []
    return replace(state, groups={**state.groups, seen.upstream: replace(group, unpicked=unpicked)}), effects


def promised(group: Group, server: Server) -> bool:
    """Whether nginx promises this server a first pick in time when it warms up."""
    method, sticky = table.method_of(group.upstream), group.upstream.policy.sticky
    return not (server.backup or sticky.cookie or method in ("hash", "ip_hash"))


def first_pick(group: Group, weights: dict[str, float], key: str) -> int:
    """Within how many picks of its upstream a server with a weight now is due, by its share of it."""
    total = sum(weights[each.key] for each in group.upstream.servers if not each.backup)
    return math.ceil(total / weights[key] - 1e-9)


def _waits(group: Group, server: Server, seen: TrafficSeen) -> bool:
    peer, counted = group.peers[server.key], seen.servers.get(server.key)
    return (
        counted is not None
        and not counted.picked
        and counted.epoch == peer.warm_up.epoch
        and warmup.ramping(peer.warm_up)
        and peer.ejected is None
        and table.routing_of(server, peer) is Routing.UP
        and promised(group, server)
    )
