"""A ramp that holds: the server that warms up is compared with its warm peers, and gets no more while it does worse, or
after its traffic has taken it out. In its minimum ready time a server is compared in the same way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from controller.core import ejection, table, traffic, warmup
from controller.core.events import Effect, Note, TrafficSeen
from controller.core.model import (
    Group,
    Health,
    Peer,
    Readings,
    Routing,
    Server,
    State,
    StepName,
    StepState,
    Traffic,
    Warmth,
    WarmUp,
    Weighed,
)
from controller.core.policy import WarmUpPolicy

_ERRORS = 0.01  # an error rate that is worse by less is no reason to hold
_LATENCY = 0.01  # seconds; the same for the mean response time
_BACK = 10  # a step back is this part of the duration


def judge(state: State, seen: TrafficSeen, now: float) -> tuple[State, list[Effect]]:
    """Hold, step back or go on, once for each window of `hold_window` seconds; the same state within one.

    A window with too few answers to tell goes on, until it is `step_back` seconds long.
    """
    group = state.groups.get(seen.upstream)
    if group is None:
        return state, []
    policy, readings = group.upstream.policy.warm_up, Readings(now, seen.boot, seen.servers)
    proving = _proving(state, seen.upstream)
    weighed, found = {}, {}
    for server in group.upstream.servers:
        key = server.key
        if not _ramps(group.peers[key]) and key not in proving:
            continue
        last = group.weighed.get(key)
        if last is None or last.since.boot != seen.boot:
            weighed[key] = Weighed(readings, now)
        elif now - last.at < policy.hold_window:
            weighed[key] = last
        elif out_of(group, key):
            weighed[key] = Weighed(readings, now)
        else:
            counts = traffic.between(last.since, readings)
            theirs = traffic.together(counts.get(each, Traffic()) for each in _warm_peers(group, server, proving))
            wrong = verdict(policy, counts.get(key, Traffic()), theirs)
            if wrong is None and now - last.since.at < policy.step_back:
                weighed[key] = replace(last, at=now)
            else:
                weighed[key] = Weighed(readings, now, last.worse if last.why else now, wrong or "")
                found[key] = wrong
    if weighed.keys() == group.weighed.keys() and all(weighed[key] is group.weighed[key] for key in weighed):
        return state, []
    state = replace(state, groups={**state.groups, seen.upstream: replace(group, weighed=weighed)})
    effects: list[Effect] = []
    for key, wrong in found.items():
        peer = group.peers[key]
        warm, said = _after(policy, peer.warm_up, wrong, now) if _ramps(peer) else (peer.warm_up, "")
        if warm is not peer.warm_up:
            state = table.with_peer(state, seen.upstream, key, replace(peer, warm_up=warm))
            effects.append(Note("warm-up", f"{seen.upstream}: {key} {said}", seen.upstream, key))
    return state, effects


def out_of(group: Group, key: str) -> str:
    """Why a server's traffic keeps it away, or its health that changes too often; empty where nothing does."""
    peer = group.peers[key]
    if peer.ejected:
        return f"nginx ejected it after {ejection.reason(peer.ejected, group.upstream.policy.outlier)}"
    return next((entry.why for entry in peer.quarantine if table.judged(entry)), "")


def taken_out(state: State, old: Group, key: str, now: float) -> tuple[State, list[Effect]]:
    """The ramp of a server that was taken out of traffic holds, for nobody warms up without requests.

    Back in traffic it is judged as any that holds, from then on.
    """
    name = old.upstream.name
    group = state.groups[name]
    peer, why = group.peers[key], out_of(group, key)
    if why and peer.warm_up.phase is Warmth.RUNNING and peer.health is not Health.DOWN:
        server = next(each for each in group.upstream.servers if each.key == key)
        if table.routing_of(server, old.peers[key]) is Routing.UP:
            warm, said = _held(group.upstream.policy.warm_up, peer.warm_up, why, now)
            note = Note("warm-up", f"{name}: {key} {said}", name, key)
            return table.with_peer(state, name, key, replace(peer, warm_up=warm)), [note]
    elif not why and peer.warm_up.phase is Warmth.HELD and out_of(old, key):
        state = table.with_peer(state, name, key, replace(peer, warm_up=replace(peer.warm_up, since=now)))
    return state, []


def unjudged(group: Group, key: str, now: float) -> WarmUp:
    """The warm-up at this time: a held one goes on when nginx's counters have not been read for `step_back` seconds."""
    warm_up, wait, weighed = group.peers[key].warm_up, group.upstream.policy.warm_up.step_back, group.weighed.get(key)
    if warm_up.phase is not Warmth.HELD or now - warm_up.since < wait or out_of(group, key):
        return warm_up
    return warm_up if weighed is not None and now - weighed.at < wait else _on(warm_up, now)


def verdict(policy: WarmUpPolicy, mine: Traffic, theirs: Traffic) -> str | None:
    """What is wrong with a server whose traffic was `mine` while that of its warm peers together was `theirs`.

    Empty: nothing; None: too few answers on one side to tell. An error is a 5xx answer or a try without an answer, out
    of all tries that ended; it must be more frequent by 1 % of the tries as well, and the mean response time longer by
    10 ms as well.
    """
    good: str | None = None if policy.hold_errors or policy.hold_latency else ""
    if policy.hold_errors and min(traffic.ended(mine), traffic.ended(theirs)) >= policy.hold_requests:
        rate, usual = (traffic.error_rate(each) for each in (mine, theirs))
        if rate > policy.hold_errors * usual and rate - usual >= _ERRORS:
            return f"error rate {rate * 100:.1f} % against {usual * 100:.1f} % of its warm peers"
        good = ""
    if policy.hold_latency and min(mine.answered, theirs.answered) >= policy.hold_requests:
        mean, usual = (traffic.mean(each) for each in (mine, theirs))
        if mean > policy.hold_latency * usual and mean - usual >= _LATENCY:
            return f"mean response time {mean * 1000:.0f} ms against {usual * 1000:.0f} ms of its warm peers"
        good = ""
    return good


def _ramps(peer: Peer) -> bool:
    return peer.warm_up.phase in (Warmth.RUNNING, Warmth.HELD)


def _proving(state: State, upstream: str) -> set[str]:
    """The servers in their minimum ready time after a change."""
    return {
        step.server
        for change in state.changes.values()
        if change.upstream == upstream and not change.status.ended
        for step in change.steps
        if step.name is StepName.HOLD and step.state is StepState.RUNNING
    }


def _held(policy: WarmUpPolicy, warm_up: WarmUp, why: str, now: float) -> tuple[WarmUp, str]:
    held = replace(warm_up, phase=Warmth.HELD, elapsed=warmup.elapsed(warm_up, now), since=now, why=why)
    return held, f"holds at {_share(policy, held, now)} of its weight: {why}"


def _after(policy: WarmUpPolicy, warm_up: WarmUp, wrong: str | None, now: float) -> tuple[WarmUp, str]:
    if warm_up.phase is Warmth.RUNNING:
        return _held(policy, warm_up, wrong, now) if wrong else (warm_up, "")
    if not wrong:
        judged = "it does as well as its warm peers" if wrong == "" else "too few answers to judge it"
        return _on(warm_up, now), f"goes on to warm up: {judged}"
    elapsed = warmup.elapsed(warm_up, now)
    if now - warm_up.since < policy.step_back or elapsed <= 0:
        return warm_up, ""
    back = replace(warm_up, elapsed=max(0.0, elapsed - policy.duration / _BACK), since=now, why=wrong)
    return back, f"steps back to {_share(policy, back, now)} of its weight: {wrong}"


def _on(warm_up: WarmUp, now: float) -> WarmUp:
    return replace(warm_up, phase=Warmth.RUNNING, since=now, why="")


def _share(policy: WarmUpPolicy, warm_up: WarmUp, now: float) -> str:
    return f"{warmup.share(policy, warm_up, now) * 100:.0f} %"


def _warm_peers(group: Group, server: Server, proving: Collection[str]) -> list[str]:
    return [
        other.key
        for other in group.upstream.servers
        if other.backup is server.backup
        and other.key not in proving
        and table.routing_of(other, group.peers[other.key]) is Routing.UP
        and not warmup.active(group.peers[other.key].warm_up)
    ]
