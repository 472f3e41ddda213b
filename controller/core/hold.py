"""A ramp that holds: the server that warms up is compared with its warm peers, and gets no more while it does worse."""

from __future__ import annotations

from dataclasses import replace

from controller.core import table, traffic, warmup
from controller.core.events import Effect, Note, TrafficSeen
from controller.core.model import Group, Peer, Readings, Routing, Server, State, Traffic, Warmth, WarmUp
from controller.core.policy import WarmUpPolicy

_ERRORS = 0.01  # an error rate that is worse by less is no reason to hold
_LATENCY = 0.01  # seconds; the same for the mean response time
_BACK = 10  # a step back is this part of the duration


def judge(state: State, seen: TrafficSeen, now: float) -> tuple[State, list[Effect]]:
    """Hold, step back or go on, once for each window of `hold_window` seconds; the same state within one."""
    group = state.groups.get(seen.upstream)
    if group is None:
        return state, []
    policy, last = group.upstream.policy.warm_up, group.weighed
    ramps = [server for server in group.upstream.servers if _judged(group.peers[server.key])]
    readings = Readings(now, seen.boot, seen.servers) if ramps else None
    if readings and last and last.boot == readings.boot and now - last.at < policy.hold_window:
        return state, []
    if readings is last:
        return state, []
    state = replace(state, groups={**state.groups, seen.upstream: replace(group, weighed=readings)})
    if readings is None or last is None:
        return state, []
    effects: list[Effect] = []
    counts = traffic.between(last, readings)
    for server in ramps:
        peer = group.peers[server.key]
        theirs = traffic.together(counts.get(key, Traffic()) for key in _warm_peers(group, server))
        warm, said = _after(policy, peer.warm_up, verdict(policy, counts.get(server.key, Traffic()), theirs), now)
        if warm is not peer.warm_up:
            state = table.with_peer(state, seen.upstream, server.key, replace(peer, warm_up=warm))
            effects.append(Note("warm-up", f"{seen.upstream}: {server.key} {said}", seen.upstream, server.key))
    return state, effects


def unjudged(group: Group, warm_up: WarmUp, now: float) -> WarmUp:
    """The warm-up at this time: a held one goes on when nginx's counters have not been read for `step_back` seconds."""
    wait = group.upstream.policy.warm_up.step_back
    if warm_up.phase is not Warmth.HELD or now - warm_up.since < wait:
        return warm_up
    if group.weighed is not None and now - group.weighed.at < wait:
        return warm_up
    return _on(warm_up, now)


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


def _judged(peer: Peer) -> bool:
    return peer.warm_up.phase in (Warmth.RUNNING, Warmth.HELD)


def _after(policy: WarmUpPolicy, warm_up: WarmUp, wrong: str | None, now: float) -> tuple[WarmUp, str]:
    elapsed = warmup.elapsed(warm_up, now)
    if warm_up.phase is Warmth.RUNNING:
        if not wrong:
            return warm_up, ""
        held = replace(warm_up, phase=Warmth.HELD, elapsed=elapsed, since=now, why=wrong)
        return held, f"holds at {_share(policy, held, now)} of its weight: {wrong}"
    late = now - warm_up.since >= policy.step_back
    if wrong == "":
        return _on(warm_up, now), "goes on to warm up: it does as well as its warm peers"
    if wrong is None:
        return (_on(warm_up, now), "goes on to warm up: too few answers to judge it") if late else (warm_up, "")
    if not late or elapsed <= 0:
        return warm_up, ""
    back = replace(warm_up, elapsed=max(0.0, elapsed - policy.duration / _BACK), since=now, why=wrong)
    return back, f"steps back to {_share(policy, back, now)} of its weight: {wrong}"


def _on(warm_up: WarmUp, now: float) -> WarmUp:
    return replace(warm_up, phase=Warmth.RUNNING, since=now, why="")


def _share(policy: WarmUpPolicy, warm_up: WarmUp, now: float) -> str:
    return f"{warmup.share(policy, warm_up, now) * 100:.0f} %"


def _warm_peers(group: Group, server: Server) -> list[str]:
    return [
        other.key
        for other in group.upstream.servers
        if other.backup is server.backup
        and table.routing_of(other, group.peers[other.key]) is Routing.UP
        and not warmup.active(group.peers[other.key].warm_up)
    ]
