"""step(state, event, now) -> (state, outcome): the whole of Headgate's behaviour as one function of values."""

from __future__ import annotations

from dataclasses import replace

from controller.core import (
    budget,
    change,
    cold,
    edge,
    ejection,
    guards,
    hold,
    membership,
    notice,
    outlier,
    panic,
    peers,
    steering,
    table,
    unpicked,
    warmup,
)
from controller.core.events import (
    AdminWished,
    AgentSaid,
    ChangeWished,
    ConfigFailed,
    ConfigRead,
    ConsumersTold,
    EdgeTold,
    Effect,
    Event,
    Note,
    OfflineNoticed,
    OnlineNoticed,
    Outcome,
    PeerSeen,
    PlaneLost,
    PlaneSeen,
    ProbeResult,
    Restored,
    SteerWished,
    StepDone,
    StepFailed,
    TableRefused,
    Ticked,
    TrafficSeen,
    WarmUpWished,
)
from controller.core.model import Admin, Change, Peer, Plane, State, Step, Warmth, WarmUp


def step(state: State, event: Event, now: float) -> tuple[State, Outcome]:
    """The state after an event, and what is to be done about it. Raises Refused for a wish that cannot be granted.

    Effects are ordered; each may be carried out after the state was stored, and again after a crash.
    """
    before = state
    state, outcome = _follow(state, event, now)
    if state is before:
        return state, outcome
    followed = state
    state, effects = panic.watch(before, state)
    return _settled(
        followed, state, replace(outcome, effects=(*outcome.effects, *effects)) if effects else outcome, now
    )


def _follow(state: State, event: Event, now: float) -> tuple[State, Outcome]:
    effects: list[Effect]
    reading: PeerSeen | None = None
    before = state
    match event:
        case ProbeResult():
            state, effects = peers.probed(state, event, now)
            if state is before:  # the usual case by far
                return state, Outcome()
        case AgentSaid():
            state, effects = peers.agent_said(state, event, now)
        case TrafficSeen():
            state, effects = ejection.mirror(state, event, now)
            state, more = outlier.compare(state, event, now)
            state, held = hold.judge(state, event, now)
            state, late = unpicked.watch(state, event, now)
            state, stopped = budget.judge(state, event, now)
            effects += [*more, *held, *late, *stopped]
        case PeerSeen():
            state, effects, reading = peers.seen(state, event, now), [], event
        case Ticked():
            state, effects = membership.expire(state, now)
            state, more = peers.tick(state, now)
            effects += more
        case PlaneSeen():
            state, effects = _plane_seen(state, event, now)
        case PlaneLost():
            state, effects = _plane_lost(state, event)
        case TableRefused():
            state, effects = _table_refused(state, event)
        case StepDone():
            state, effects = change.finish(state, event, now), []
        case StepFailed():
            state, effects = change.failed(state, event, now), []
        case SteerWished():
            state, effects = steering.steer(state, event, now)
        case ChangeWished():
            return _settled(before, *change.begin(state, event, now), now)
        case AdminWished():
            state, effects = _admin_wished(state, event, now)
        case WarmUpWished():
            state, effects = _warm_up_wished(state, event, now), []
        case OfflineNoticed():
            return _settled(before, *notice.offline(state, event, now), now)
        case OnlineNoticed():
            return _settled(before, *notice.online(state, event, now), now)
        case ConfigRead():
            state, effects = membership.read(state, event, now)
        case ConfigFailed():
            state, effects = _config_failed(state, event)
        case ConsumersTold():
            effects = [notice.told(event)]
        case EdgeTold():
            state, effects = edge.told(state, event)
        case Restored():
            state, effects = _restored(state, event), []
    state, outcome = _settled(before, state, Outcome(tuple(effects)), now)
    before = state
    state, more = change.progress(state, now, reading)
    return _settled(before, state, replace(outcome, effects=(*outcome.effects, *more)), now)


def _settled(before: State, state: State, outcome: Outcome, now: float) -> tuple[State, Outcome]:
    """With what follows for warm-ups."""
    state, more = cold.settle(before, state, now)
    return state, replace(outcome, effects=(*outcome.effects, *more)) if more else outcome


def _plane_seen(state: State, event: PlaneSeen, now: float) -> tuple[State, list[Effect]]:
    before = state.plane
    notes: list[Effect] = []
    if before.boot and before.boot != event.boot:
        notes.append(Note("plane", f"nginx was restarted; it serves revision {event.revision}"))
        state = _renewed(ejection.clear(state), now)
    elif before.error:
        notes.append(Note("plane", f"nginx answers; it serves revision {event.revision}"))
    # Revisions go on from what nginx reports: a daemon that lost its store, or the end of it, must not fall behind
    # that, nor take the table of another life for its own because the numbers are the same.
    if event.revision > state.revision or (event.revision == state.revision and not event.ours):
        state = change.renumber(replace(state, revision=event.revision + 1))
    refused = "" if event.revision >= state.revision else before.refused
    if before.refused and not refused:
        notes.append(Note("plane", f"nginx takes tables again; it serves revision {event.revision}"))
    return replace(state, plane=Plane(event.boot, event.revision, "", refused)), notes


def _renewed(state: State, now: float) -> State:
    """Another nginx goes on from the last table that was written, and its own count is the lesser one. In an epoch that
    it does not know it takes ours."""
    for name, group in state.groups.items():
        for key, peer in group.peers.items():
            if peer.warm_up.phase is Warmth.RUNNING:
                warm = replace(
                    peer.warm_up, epoch=state.next_epoch, elapsed=warmup.elapsed(peer.warm_up, now), since=now
                )
                state = replace(state, next_epoch=state.next_epoch + 1)
                state = table.with_peer(state, name, key, replace(peer, warm_up=warm))
    return state


def _plane_lost(state: State, event: PlaneLost) -> tuple[State, list[Effect]]:
    if state.plane.error == event.error:
        return state, []
    return replace(state, plane=replace(state.plane, error=event.error)), [Note("plane", event.error)]


def _table_refused(state: State, event: TableRefused) -> tuple[State, list[Effect]]:
    if state.plane.refused == event.error:
        return state, []
    text = f"nginx does not take the table, and goes on with the one before: {event.error}"
    return replace(state, plane=replace(state.plane, refused=event.error)), [Note("plane", text)]


def _admin_wished(state: State, event: AdminWished, now: float) -> tuple[State, list[Effect]]:
    group = change.group_of(state, event.upstream)
    keys = change.resolve(group, (event.server,))
    state, effects = change.claim(state, event.upstream, keys, False, now)
    if event.admin is not Admin.READY and not event.forced:
        guards.refuse_emptying(group, keys)
    for key in keys:
        if state.groups[event.upstream].peers[key].admin is not event.admin:
            state = peers.set_admin(state, event.upstream, key, event.admin, now)
            effects.append(Note("admin", f"{event.upstream}: {key} is now {event.admin}", event.upstream, key))
        if event.admin is Admin.READY:
            state, more = peers.pardon(state, event.upstream, key)
            effects += more
    return state, effects


def _warm_up_wished(state: State, event: WarmUpWished, now: float) -> State:
    for key in change.resolve(change.group_of(state, event.upstream), (event.server,)):
        state = cold.wished(state, event.upstream, key, now)
    return state


def _config_failed(state: State, event: ConfigFailed) -> tuple[State, list[Effect]]:
    if state.config_error == event.error:
        return state, []
    return replace(state, config_error=event.error), [Note("config", f"the old configuration stays: {event.error}")]


def _restored(state: State, event: Restored) -> State:
    shift = event.away if event.rebooted else 0.0
    stored = {name: _shift_peer(peer, shift) for name, peer in event.peers.items()}
    epoch = event.next_epoch
    if event.rebooted:  # nginx was restarted, too
        for name, peer in stored.items():
            if peer.warm_up.phase is Warmth.RUNNING:
                stored[name], epoch = replace(peer, warm_up=replace(peer.warm_up, epoch=epoch)), epoch + 1
    return replace(
        state,
        revision=event.revision,
        next_change=event.next_change,
        next_epoch=epoch,
        stored=stored,
        changes={number: _shift_change(each, event.away) for number, each in event.changes.items()},
    )


def _shift_peer(peer: Peer, by: float) -> Peer:
    return replace(
        peer,
        warm_up=_shift_warm_up(peer.warm_up, by),
        quarantine=tuple(replace(entry, until=entry.until + by) for entry in peer.quarantine),
        ejected=replace(peer.ejected, until=peer.ejected.until + by) if peer.ejected else None,
        changed=tuple(at + by for at in peer.changed),
    )


def _shift_warm_up(warm_up: WarmUp, by: float) -> WarmUp:
    return replace(warm_up, since=warm_up.since + by)


def _shift_change(each: Change, by: float) -> Change:
    return replace(each, created=each.created + by, steps=tuple(_shift_step(s, by) for s in each.steps))


def _shift_step(step: Step, by: float) -> Step:
    return replace(
        step,
        started=None if step.started is None else step.started + by,
        ended=None if step.ended is None else step.ended + by,
        quiet=None if step.quiet is None else step.quiet + by,
    )
