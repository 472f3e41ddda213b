"""From the model and the records to the API's shapes (wire.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.api import wire
from controller.api.planned import ForeseenView, HappenedView
from controller.core import warmup
from controller.core.model import Agent, Group, Peer, Server, State, StepState
from controller.core.table import effective_weights, method_of
from controller.ports import ChangeRecord, Counters, EventRecord, NginxConfig, PeerCounters

UNSEEN = PeerCounters(in_flight=0, requests=0, failures=0)
"""The counters of a server of which nginx has not spoken yet."""


def status(state: State, counters: Counters, data_plane: str, now: float) -> wire.Status:
    """The whole state as it is at `now`."""
    return wire.Status(
        revision=state.revision,
        data_plane=data_plane,
        offline=state.offline,
        config=wire.ConfigView(state=_config_state(state), error=state.config_error or None),
        upstreams=[upstream(group, state, counters, now) for group in state.groups.values()],
    )


def _config_state(state: State) -> str:
    if state.config_error:
        return "error"
    return "ok" if state.configured else "unread"


def upstreams(state: State, counters: Counters, config: NginxConfig | None, now: float) -> wire.Upstreams:
    """All upstreams, and what the configuration says beside them."""
    return wire.Upstreams(
        upstreams=[upstream(group, state, counters, now) for group in state.groups.values()],
        unhooked=list(config.unhooked) if config else [],
        warnings=list(config.warnings) if config else [],
    )


def upstream(group: Group, state: State, counters: Counters, now: float) -> wire.UpstreamView:
    """One upstream with its servers."""
    weights = effective_weights(group, now)
    return wire.UpstreamView(
        name=group.upstream.name,
        method=method_of(group.upstream),
        fail_open=group.fail_open,
        servers=[server(group, each, state, counters, now, weights) for each in group.upstream.servers],
    )


def server(
    group: Group,
    configured: Server,
    state: State,
    counters: Counters,
    now: float,
    weights: Mapping[str, float] | None = None,
) -> wire.ServerView:
    """One server: the configured line, its living side and its counters; `weights` are its upstream's, if known."""
    peer = group.peers[configured.key]
    seen = counters.upstreams.get(group.upstream.name, {}).get(configured.key, UNSEEN)
    policy = group.upstream.policy.warm_up
    return wire.ServerView(
        address=configured.key,
        weight=configured.weight,
        effective_weight=(weights or effective_weights(group, now))[configured.key],
        admin=peer.admin,
        health=peer.health,
        reason=peer.reason,
        warm_up=wire.WarmUpView(
            phase=peer.warm_up.phase,
            elapsed=warmup.elapsed(peer.warm_up, now),
            duration=policy.duration,
            share=warmup.share(policy, peer.warm_up, now),
            why=peer.warm_up.why,
        ),
        quarantine=[
            wire.QuarantineView(remaining=max(0.0, q.until - now), why=q.why, kind=q.kind) for q in peer.quarantine
        ],
        ejected=_ejected(peer, now),
        agent=None if peer.agent == Agent() else wire.AgentView.model_validate(peer.agent, from_attributes=True),
        in_flight=seen.in_flight,
        requests=seen.requests,
        answered=seen.answered,
        errors=seen.errors,
        failures=seen.failures,
        timeouts=seen.timeouts,
        response_time=seen.seconds / seen.answered if seen.answered else None,
        change=_change_of(state, group.upstream.name, configured.key),
        held=peer.held or None,
    )


def _ejected(peer: Peer, now: float) -> wire.EjectedView | None:
    if peer.ejected is None:
        return None
    left = max(0.0, peer.ejected.until - now)
    return wire.EjectedView(reason=peer.ejected.reason, remaining=left, times=peer.ejected.times)


def change(record: ChangeRecord) -> wire.ChangeView:
    """A change as recorded, with its steps."""
    steps = [wire.StepView.model_validate(step, from_attributes=True) for step in record.steps]
    version = sum((step.started_at is not None) + (step.ended_at is not None) for step in steps)
    plan = ForeseenView.model_validate(record.plan, from_attributes=True) if record.plan else None
    outcome = HappenedView.model_validate(record.outcome, from_attributes=True) if record.outcome else None
    summary = change_summary(record).model_dump()
    return wire.ChangeView(**summary, version=version, steps=steps, plan=plan, outcome=outcome)


def change_summary(record: ChangeRecord) -> wire.ChangeSummary:
    """A change as recorded, without its steps."""
    return wire.ChangeSummary.model_validate(record, from_attributes=True)


def events(records: Iterable[EventRecord]) -> wire.Events:
    """wire.Events as recorded."""
    return wire.Events(events=[event(record) for record in records])


def event(record: EventRecord) -> wire.EventView:
    """One event as recorded."""
    return wire.EventView.model_validate(record, from_attributes=True)


def _change_of(state: State, upstream: str, key: str) -> int | None:
    unfinished = (StepState.PENDING, StepState.RUNNING)
    return next(
        (
            each.id
            for each in state.changes.values()
            if not each.status.ended and each.upstream == upstream
            for step in each.steps
            if step.server == key and step.state in unfinished
        ),
        None,
    )
