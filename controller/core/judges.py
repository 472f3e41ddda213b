"""When the steps are over that no adapter carries out: judged from what is known and seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from controller.core import drain, hold, peers, shared, warmup
from controller.core.events import PeerSeen
from controller.core.model import Admin, Change, Group, Health, Peer, State, Step, StepName, StepState, Warmth
from controller.core.policy import WarmUpPolicy
from controller.core.steps import fail, in_vain, nearest, put, settle, with_step


def _judge_drain(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy.drain
    if not state.plane.error and state.plane.revision >= step.revision:
        return settle(state, change, at, StepState.DONE, f"published as revision {step.revision}", now)
    if now - (step.started or now) < policy.timeout:
        return state
    why = f"nginx did not take the table within {policy.timeout:g} s: {state.plane.trouble or 'it serves an older one'}"
    if policy.on_timeout == "proceed":
        return settle(state, change, at, StepState.DONE, f"{why}; proceeding as drain.on_timeout says", now)
    return fail(state, change, at, why, now)


def _judge_sessions(state: State, change: Change, at: int, now: float, seen: PeerSeen | None) -> State:
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy.sticky
    late = now - (_drained(change, at).started or now) >= policy.drain
    if seen and seen.requests != step.requests:
        step = replace(step, requests=seen.requests, quiet=now)
        state = put(state, with_step(change, at, step))
    idle = step.quiet is not None and now - step.quiet >= policy.idle
    if not late and not idle:
        return state
    why = f"no session asked for {policy.idle:g} s" if idle else f"sessions move after {policy.drain:g} s"
    state = peers.end_sessions(state, change.upstream, step.server)
    change = state.changes[change.id]
    change = with_step(change, at, replace(step, revision=state.revision))
    return settle(state, change, at, StepState.DONE, why, now)


def _judge_empty(state: State, change: Change, at: int, now: float, seen: PeerSeen | None) -> State:
    """Empty is a process when each of its peers was proved to be: none of them gets anything new meanwhile."""
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy.drain
    drained, sessions = _drained(change, at), nearest(change, at, StepName.SESSIONS)
    # Sticky sessions have time of their own: while they lasted, requests came.
    requested = max(drained.started or now, (sessions and sessions.ended) or 0.0)
    left = tuple(mate for mate in step.mates if shared.peer_of(state, mate))
    mine = next((mate for mate in left if seen and (mate.upstream, mate.server) == (seen.upstream, seen.server)), None)
    seen = seen if mine else None
    verdict = drain.verdict(policy, requested, step.revision, seen, now)
    if verdict is drain.Verdict.EMPTY:
        left = tuple(mate for mate in left if mate is not mine)
    if not left:
        names = [mate.upstream for mate in drained.mates]
        also = f", nor by {', '.join(dict.fromkeys(names))}" if names else ""
        return settle(state, change, at, StepState.DONE, f"no request in flight{also}", now)
    if verdict in (drain.Verdict.WAIT, drain.Verdict.EMPTY):
        return state if left == step.mates else put(state, with_step(change, at, replace(step, mates=left)))
    why = "requests in flight unknown: nginx does not answer"
    if seen:
        why = f"{seen.in_flight} request{'s' * (seen.in_flight != 1)} still in flight"
    if mine and mine.upstream != change.upstream:
        why += f" by {mine.upstream}"
    why += f" after {policy.timeout:g} s"
    if verdict is drain.Verdict.PROCEED:
        return settle(state, change, at, StepState.DONE, f"{why}; proceeding as drain.on_timeout says", now)
    return fail(state, change, at, why, now)


def _judge_settle(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    wait = state.groups[change.upstream].upstream.policy.drain.settle
    drained = _drained(change, at)
    if now - (drained.ended or now) < wait:
        return state
    return settle(state, change, at, StepState.DONE, f"{wait:g} s after deregistration", now)


def _judge_reset(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    state, forgot = peers.reset(state, change.upstream, change.steps[at].server)
    return settle(state, change, at, StepState.DONE, f"forgot {', '.join(forgot) or 'nothing: it was clean'}", now)


def _judge_up(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, group = change.steps[at], state.groups[change.upstream]
    limit = group.upstream.policy.rollout.up_timeout
    down = {"": group.peers[step.server], **_awaited(state, change, at)}
    down = {name: peer for name, peer in down.items() if peer.health is not Health.UP}
    if not down:
        return settle(state, change, at, StepState.DONE, "probes passed", now)
    if now - (step.started or now) >= limit:
        name, peer = next(iter(down.items()))
        why = peer.reason or "no probe has passed"
        return fail(state, change, at, f"not up{name and f' in {name}'} within {limit:g} s: {why}", now)
    return state


def _judge_warm(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, group = change.steps[at], state.groups[change.upstream]
    peer, policy = group.peers[step.server], group.upstream.policy.warm_up
    warm = peer.warm_up
    if peer.health is Health.DOWN:
        return fail(state, change, at, f"went down while warming: {peer.reason}", now)
    if why := _repeated(group, step):
        return fail(state, change, at, f"taken out of traffic again while warming: {why}", now)
    if why := _away(group, step):
        return _warms_on(state, change, at, now, f"held: {why}")
    idle = warm.phase is Warmth.WAITING and now - warm.since >= policy.duration
    if idle or not warmup.active(warm):
        return _judge_warm_mates(state, change, at, now, idle)
    if warm.phase is Warmth.HELD and warm.elapsed <= 0 and now - warm.since >= 2 * policy.step_back:
        return fail(state, change, at, f"does not warm up: {warm.why}", now)
    detail = ""
    if warm.phase is Warmth.HELD:
        detail = f"held: {warm.why}"
    elif warm.phase is Warmth.QUEUED:
        detail = _QUEUED
    return _warms_on(state, change, at, now, detail)


def _judge_warm_mates(state: State, change: Change, at: int, now: float, idle: bool) -> State:
    """The server is warm, or idle; so are its mates to be that served before: the next batch leaves them as well."""
    step = change.steps[at]
    for name, peer in _awaited(state, change, at).items():
        policy, warm = state.groups[name].upstream.policy.warm_up, peer.warm_up
        if peer.health is Health.DOWN:
            return fail(state, change, at, f"went down in {name} while warming: {peer.reason}", now)
        if warm.phase is Warmth.HELD and warm.elapsed <= 0 and now - warm.since >= 2 * policy.step_back:
            return fail(state, change, at, f"does not warm up in {name}: {warm.why}", now)
        if warmup.active(warm) and not (warm.phase is Warmth.WAITING and now - warm.since >= policy.duration):
            return _warms_on(state, change, at, now, f"waits until it is warm in {name}")
    patience = state.groups[change.upstream].upstream.policy.warm_up.duration
    said = f"no request came in {patience:g} s" if idle else f"warm after {now - (step.started or now):.1f} s"
    return settle(state, change, at, StepState.DONE, said, now)


def _warms_on(state: State, change: Change, at: int, now: float, detail: str) -> State:
    """The server is not warm yet, and `detail` may say why. It has `warm_timeout` from when its turn has come, and
    `wait_timeout` until then."""
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy
    if step.detail == _QUEUED != detail:
        return _say(state, change, at, detail, now)
    since = step.quiet or step.started or now
    if detail == _QUEUED:
        taken, limit = in_vain(change, since, now), policy.rollout.wait_timeout
    else:
        taken, limit = now - since, policy.rollout.warm_timeout or _patience(policy.warm_up)
    if taken >= limit:
        return fail(state, change, at, f"not warm within {limit:g} s{detail and f': {detail}'}", now)
    return _say(state, change, at, detail, step.quiet)


def _patience(policy: WarmUpPolicy) -> float:
    """Seconds for a ramp that steps back all the way, ten steps, and goes up again, with a few holds."""
    return 5 * policy.duration + 10 * policy.step_back


_QUEUED = "waits until others are warm"


def _judge_hold(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, group = change.steps[at], state.groups[change.upstream]
    peer, wait = group.peers[step.server], group.upstream.policy.rollout.ready_time
    if peer.health is Health.DOWN:
        return fail(state, change, at, f"went down within its minimum ready time: {peer.reason}", now)
    if why := _repeated(group, step):
        return fail(state, change, at, f"taken out of traffic again within its minimum ready time: {why}", now)
    if why := _away(group, step):
        ends = (*(entry.until for entry in peer.quarantine), peer.ejected.until if peer.ejected else now)
        return _say(state, change, at, f"held: {why}", max(ends))
    weighed, patience = group.weighed.get(step.server), group.upstream.policy.warm_up.step_back
    if weighed and weighed.why and now - weighed.at < patience:
        if weighed.at - weighed.worse >= patience:
            return fail(state, change, at, f"does worse within its minimum ready time: {weighed.why}", now)
        return _say(state, change, at, f"held: {weighed.why}", step.quiet)
    # Away is not ready: the time counts anew.
    if now - (step.quiet or step.started or now) < wait:
        return _say(state, change, at, "", step.quiet)
    return settle(state, change, at, StepState.DONE, f"ready for {wait:g} s", now)


#: Each takes the state, the change, its step, the time, and a reading of that very server if there is a new one.
JUDGES: dict[StepName, Callable[[State, Change, int, float, PeerSeen | None], State]] = {
    StepName.DRAIN: _judge_drain,
    StepName.SESSIONS: _judge_sessions,
    StepName.EMPTY: _judge_empty,
    StepName.SETTLE: _judge_settle,
    StepName.RESET: _judge_reset,
    StepName.UP: _judge_up,
    StepName.WARM: _judge_warm,
    StepName.HOLD: _judge_hold,
}


def _drained(change: Change, at: int) -> Step:
    found = nearest(change, at, StepName.DRAIN)
    assert found is not None, "whoever is emptied was drained before"
    return found


def _awaited(state: State, change: Change, at: int) -> dict[str, Peer]:
    """The mates of the step's server that served before and are wanted still, by upstream."""
    drained = nearest(change, at, StepName.DRAIN)
    found = {mate.upstream: shared.peer_of(state, mate) for mate in drained.mates if mate.served} if drained else {}
    return {name: peer for name, peer in found.items() if peer and peer.admin is Admin.READY}


def _away(group: Group, step: Step) -> str:
    """Why the step's server is kept out of traffic, though it should be in it; empty where it is not."""
    quarantine = group.peers[step.server].quarantine
    return hold.out_of(group, step.server) or (quarantine[-1].why if quarantine else "")


def _repeated(group: Group, step: Step) -> str:
    """Why the step's server was taken out of traffic, when that is the second time within the step; else empty.

    Once may be an accident: a connection that broke, a backend of its own that restarted.
    """
    if group.peers[step.server].taken_out - step.taken_out < 2:
        return ""
    return hold.out_of(group, step.server) or "twice within this step"


def _say(state: State, change: Change, at: int, detail: str, quiet: float | None = None) -> State:
    step = change.steps[at]
    said = replace(step, detail=detail, quiet=quiet)
    return state if said == step else put(state, with_step(change, at, said))
