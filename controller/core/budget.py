"""The budget of a change: it stops when its upstream as a whole errs, or is slower than before, by nginx's counters."""

from __future__ import annotations

from dataclasses import replace

from controller.core import traffic
from controller.core.change import running
from controller.core.events import Effect, TrafficSeen
from controller.core.model import Change, ChangeStatus, Readings, State, StepName, Traffic
from controller.core.outlier import LEAST_SECONDS
from controller.core.policy import RolloutPolicy
from controller.core.steps import STEPS, put
from controller.core.stopping import stop


def judge(state: State, seen: TrafficSeen, now: float) -> tuple[State, list[Effect]]:
    """Judge the change that brings servers of this upstream back, once in a window; the same state within one.

    A window lasts until `window` seconds have passed and `min_requests` tries have ended; a change begins a new one.
    One that is forced is not judged. A change that began when nothing was known of the traffic, or in another life of
    the daemon, is compared with its first window.
    """
    group = state.groups.get(seen.upstream)
    if group is None:
        return state, []
    policy, last = group.upstream.policy.rollout, group.measured
    if not (policy.max_errors or policy.max_latency):
        return state, []
    readings, counts = Readings(now, seen.boot, seen.servers), Traffic()
    if last and last.boot == readings.boot:
        if now - last.at < policy.window:
            return state, []
        counts = traffic.together(traffic.between(last, readings).values())
        if traffic.ended(counts) < policy.min_requests:
            return state, []
    measured = bool(traffic.ended(counts))
    changes = [each for each in running(state) if each.upstream == seen.upstream and StepName.UP in STEPS[each.kind]]
    group = replace(group, measured=readings, usual=counts if measured and not changes else group.usual)
    state = replace(state, groups={**state.groups, seen.upstream: group})
    effects: list[Effect] = []
    for change in changes if measured else ():
        if change.status not in (ChangeStatus.RUNNING, ChangeStatus.PAUSED) or change.forced or change.error:
            continue
        if why := exceeded(policy, counts, change):
            state, said = stop(state, change, why, now)
            effects.append(said)
        elif change.before is None:
            state = put(state, replace(change, before=counts))
    return state, effects


def exceeded(policy: RolloutPolicy, counts: Traffic, change: Change) -> str:
    """How these counts of one window go beyond the change's budget; empty where they do not.

    An upstream that erred more than `max_errors` before the change began is not judged by that: the change may be its
    cure. A mean response time must be longer by 10 ms as well.
    """
    before = change.before or Traffic()
    rate = traffic.error_rate(counts)
    if policy.max_errors and rate > policy.max_errors >= traffic.error_rate(before):
        return (
            f"{rate * 100:.1f} % of {traffic.ended(counts)} tries of {change.upstream} failed or were answered 5xx, "
            f"and max_errors is {policy.max_errors * 100:g} %"
        )
    if policy.max_latency and counts.answered and before.answered:
        mean, usual = traffic.mean(counts), traffic.mean(before)
        if mean > policy.max_latency * usual and mean - usual >= LEAST_SECONDS:
            return (
                f"the mean response time of {change.upstream} is {mean * 1000:.0f} ms against {usual * 1000:.0f} ms "
                f"before, and max_latency is {policy.max_latency:g}"
            )
    return ""
