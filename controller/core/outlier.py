"""Outliers: servers that answer worse than their peers do, by what the traffic shows.

Success rate (Envoy): a server whose share of tries answered without 5xx lies more than `success_rate` standard
deviations below the mean of the compared servers. Latency: one whose mean response time is more than `latency` times
the median. Both must differ by more than noise as well, so that equals are not ejected for a single answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from controller.core import pseudo_dead, table, traffic, warmup
from controller.core.events import Effect, Note, TrafficSeen
from controller.core.model import Group, Quarantine, Readings, State, Traffic
from controller.core.policy import OutlierPolicy

KIND = "outlier"
LEAST_RATE = 0.01  # by which a success rate must be worse
LEAST_SECONDS = 0.01  # by which a mean response time must be longer


@dataclass(frozen=True, slots=True)
class Outlier:
    """A server that is worse than its peers, and how."""

    key: str
    why: str


def compare(state: State, event: TrafficSeen, now: float) -> tuple[State, list[Effect]]:
    """Every `interval` compare the servers of an upstream, and put the outliers in quarantine, the worst first; note
    those that only their probes find alive.

    Never more than `max_ejected` of the servers are away, with those that nginx ejected, but one may always be; and
    never the last one that serves.
    """
    group = state.groups.get(event.upstream)
    if group is None:
        return state, []
    policy = group.upstream.policy.outlier
    readings = Readings(now, event.boot, event.servers)
    if group.compared and group.compared.boot == event.boot and now - group.compared.at < policy.interval:
        return state, []
    last = group.compared or readings
    counts = traffic.between(last, readings)
    group = replace(group, compared=readings)
    state = replace(state, groups={**state.groups, event.upstream: group})
    state, effects = pseudo_dead.by_traffic(state, event.upstream, counts, now - last.at)
    found = {outlier.key: outlier for outlier in outliers(group, counts)}
    state = _calm(state, event.upstream, counts, found)
    room = max(1, math.floor(policy.max_ejected * len(group.upstream.servers))) - len(_away(group))
    for outlier in list(found.values())[: max(0, room)]:
        group = state.groups[event.upstream]
        if not table.serves(group, without=outlier.key):
            break
        peer = group.peers[outlier.key]
        times = peer.ejections + 1
        seconds = min(policy.base * times, policy.cap)
        entry = Quarantine(now + seconds, outlier.why, KIND)
        peer = replace(
            peer,
            quarantine=(*peer.quarantine, entry),
            ejections=min(times, math.ceil(policy.cap / policy.base)),
            taken_out=peer.taken_out + 1,
        )
        state = table.with_peer(state, event.upstream, outlier.key, peer)
        text = f"{event.upstream}: {outlier.key} is an outlier and gets nothing for {seconds:g} s: {outlier.why}"
        text += f"; {table.count(state.groups[event.upstream])}"
        effects.append(Note(KIND, text, event.upstream, outlier.key))
    return state, effects


def outliers(group: Group, counts: Mapping[str, Traffic]) -> list[Outlier]:
    """The servers in traffic that are worse than the others by these counts, the worst first.

    One that warms up is judged by its success rate only: it is slow by nature.
    """
    policy = group.upstream.policy.outlier
    enough = {
        key: count
        for key in table.serving(group)
        if (count := counts.get(key)) and count.answered + count.failures >= policy.requests
    }
    warm = {
        key: count.seconds / count.answered
        for key, count in enough.items()
        if count.answered >= policy.requests and not warmup.active(group.peers[key].warm_up)
    }
    rates = {key: (each.answered - each.errors) / (each.answered + each.failures) for key, each in enough.items()}
    found = _by_success(policy, rates)
    return found + [outlier for outlier in _by_latency(policy, warm) if outlier.key not in {o.key for o in found}]


def _by_success(policy: OutlierPolicy, rates: Mapping[str, float]) -> list[Outlier]:
    if not policy.success_rate or len(rates) < policy.hosts:
        return []
    mean = statistics.fmean(rates.values())
    deviation = math.sqrt(statistics.fmean((rate - mean) ** 2 for rate in rates.values()))
    found = []
    for key in sorted(rates, key=lambda key: rates[key]):
        others = (mean * len(rates) - rates[key]) / (len(rates) - 1)
        if rates[key] < mean - policy.success_rate * deviation and others - rates[key] > LEAST_RATE:
            found.append(
                Outlier(key, f"success rate {100 * rates[key]:.1f} % against {100 * others:.1f} % of its peers")
            )
    return found


def _by_latency(policy: OutlierPolicy, means: Mapping[str, float]) -> list[Outlier]:
    if not policy.latency or len(means) < policy.hosts:
        return []
    median = statistics.median(means.values())
    return [
        Outlier(key, f"mean response time {means[key]:.3f} s against a median of {median:.3f} s")
        for key in sorted(means, key=lambda key: -means[key])
        if means[key] > policy.latency * median and means[key] - median > LEAST_SECONDS
    ]


def _away(group: Group) -> list[str]:
    """The servers that are away as outliers, or ejected by nginx."""
    return [key for key, peer in group.peers.items() if peer.ejected or table.is_outlier(peer)]


def _calm(state: State, name: str, counts: Mapping[str, Traffic], found: Mapping[str, Outlier]) -> State:
    """An interval spent well in traffic takes one from how often a server was an outlier (Envoy)."""
    group = state.groups[name]
    for key in table.serving(group):
        peer, count = group.peers[key], counts.get(key)
        if peer.ejections and count and count.answered and key not in found:
            state = table.with_peer(state, name, key, replace(peer, ejections=peer.ejections - 1))
    return state
