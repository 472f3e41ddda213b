"""Every operation as recorded steps: which there are, when each begins, and what ends it.

A change can be interrupted between any two events. What a step has done is in the state before the next one begins,
so that a daemon that was killed derives from the state where it was and goes on (`resume`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from controller.core import drain, peers, table, warmup
from controller.core.events import (
    ChangeWished,
    Effect,
    Note,
    Outcome,
    PeerSeen,
    ProbeNow,
    RunStep,
    StepDone,
    StepFailed,
)
from controller.core.model import (
    Admin,
    Change,
    ChangeKind,
    ChangeStatus,
    Group,
    Health,
    Refused,
    State,
    Step,
    StepName,
    StepState,
    Warmth,
)
from controller.core.policy import Policy

OFFLINE = (
    StepName.FIND,
    StepName.BEFORE_DRAIN,
    StepName.DRAIN,
    StepName.NOTIFY,
    StepName.SESSIONS,
    StepName.EMPTY,
    StepName.AFTER_DRAIN,
    StepName.SETTLE,
    StepName.TERMINATE,
    StepName.EXIT,
    StepName.KILL,
)
ONLINE = (StepName.START, StepName.UP, StepName.AFTER_UP, StepName.WARM, StepName.HOLD)

#: The steps of each kind of change, for each of its servers, in order.
STEPS: dict[ChangeKind, tuple[StepName, ...]] = {
    ChangeKind.DRAIN: (StepName.DRAIN, StepName.SESSIONS, StepName.EMPTY),
    ChangeKind.STOP: OFFLINE,
    ChangeKind.START: ONLINE,
    ChangeKind.RESTART: OFFLINE + ONLINE,
    ChangeKind.ROLLOUT: OFFLINE + ONLINE,
}

_HOOKS = frozenset({StepName.BEFORE_DRAIN, StepName.AFTER_DRAIN, StepName.AFTER_UP})

#: Steps that an adapter carries out; the others are judged here, from what is seen.
BY_ADAPTER = _HOOKS | {
    StepName.FIND,
    StepName.NOTIFY,
    StepName.TERMINATE,
    StepName.EXIT,
    StepName.KILL,
    StepName.START,
}

#: Steps before which a server has not been told to stop: when one of them fails, it gets back what it had.
_REVERSIBLE = frozenset(
    {
        StepName.DRAIN,
        StepName.NOTIFY,
        StepName.SESSIONS,
        StepName.EMPTY,
        StepName.AFTER_DRAIN,
        StepName.SETTLE,
        StepName.TERMINATE,
    }
)
_ENDED = frozenset({StepState.DONE, StepState.FAILED, StepState.SKIPPED})
_KEPT = 50  # ended changes that stay in memory; the store has them all


def begin(state: State, wish: ChangeWished, now: float) -> tuple[State, Outcome]:
    """Record a change and begin it; Refused where the wish cannot be granted.

    Without servers a rollout takes every server that is ready, in the order of nginx.conf.
    """
    group = group_of(state, wish.upstream)
    keys = resolve(group, wish.servers)
    if not keys:
        keys = tuple(s.key for s in group.upstream.servers if not s.down and group.peers[s.key].admin is Admin.READY)
        if not keys:
            raise Refused("invalid", f"{wish.upstream} has no server that is ready", "name the servers, or enable one")
    if wish.kind is not ChangeKind.DRAIN and group.upstream.policy.process is None:
        raise Refused(
            "invalid",
            f"headgate does not know the processes of {wish.upstream}",
            f"add [upstream.{wish.upstream}.process] to headgate.toml, with a unit, a pid_file or a start command",
        )
    state, effects = claim(state, wish.upstream, keys, wish.kind is not ChangeKind.DRAIN, now)
    returning = StepName.START in STEPS[wish.kind]
    size = max(1, wish.batch) if returning else len(keys)
    if StepName.DRAIN in STEPS[wish.kind] and not wish.forced:
        for at in range(0, len(keys), size):
            refuse_emptying(group, keys[at : at + size])
    names = _steps_of(wish.kind, group.upstream.policy)
    steps = tuple(Step(name, key, at // size) for at, key in enumerate(keys) for name in names)
    change = Change(state.next_change, wish.kind, wish.upstream, steps, now, wish.forced)
    state = _put(replace(state, next_change=change.id + 1), change)
    effects.append(
        _note(change, "change", f"change {change.id}: {wish.kind} of {', '.join(keys)} in {wish.upstream} begins")
    )
    state, more = progress(state, now)
    return state, Outcome((*effects, *more), change.id)


def _steps_of(kind: ChangeKind, policy: Policy) -> tuple[StepName, ...]:
    """The steps of this kind of change, without those that are switched off."""
    off = set()
    if not policy.notices.enabled:
        off.add(StepName.NOTIFY)
    if not policy.sticky.cookie:
        off.add(StepName.SESSIONS)
    off |= {name for name in _HOOKS if not getattr(policy.hooks, name)}
    return tuple(name for name in STEPS[kind] if name not in off)


def group_of(state: State, upstream: str) -> Group:
    """The upstream's group; Refused, with the names that there are."""
    if upstream not in state.groups:
        known = ", ".join(sorted(state.groups)) or "none"
        raise Refused("not_found", f"no upstream {upstream!r} is managed", f"managed upstreams: {known}")
    return state.groups[upstream]


def resolve(group: Group, names: Sequence[str]) -> tuple[str, ...]:
    """Server keys for keys or addresses as written (a host name stands for all its addresses); Refused if unknown."""
    keys: dict[str, None] = {}
    for name in names:
        found = [s.key for s in group.upstream.servers if name in (s.key, s.address)]
        if not found:
            known = ", ".join(s.key for s in group.upstream.servers) or "none"
            raise Refused("not_found", f"{group.upstream.name} has no server {name!r}", f"its servers: {known}")
        keys.update(dict.fromkeys(found))
    return tuple(keys)


def refuse_emptying(group: Group, keys: Sequence[str], otherwise: str = "insist with --force") -> None:
    """Refused when taking these servers away leaves no server that serves, and one does now."""
    if table.serving(group) and not table.serving(group, without=keys):
        raise Refused(
            "guard",
            f"{', '.join(keys)}: no other server of {group.upstream.name} serves",
            f"bring another one up first, or {otherwise}",
        )


def claim(state: State, upstream: str, keys: Sequence[str], processes: bool, now: float) -> tuple[State, list[Effect]]:
    """Make way for a new wish about these servers.

    A drain gives way to what is wished later of its server. Any other change keeps its servers, and while it runs no
    second one may handle processes of the upstream: Refused.
    """
    effects: list[Effect] = []
    for change in running(state):
        if change.upstream != upstream:
            continue
        shared = {step.server for step in change.steps} & set(keys)
        if change.kind is ChangeKind.DRAIN:
            if shared:
                state, more = _end(state, replace(change, error="another wish took its place"), now)
                effects += more
        elif shared or processes:
            raise Refused(
                "busy",
                f"change {change.id} ({change.kind}) of {upstream} is still running",
                f"follow it with `headgate changes {change.id}` and try again when it has ended",
            )
    return state, effects


def running(state: State) -> list[Change]:
    """The changes that have not ended, oldest first."""
    return [change for _, change in sorted(state.changes.items()) if change.status is ChangeStatus.RUNNING]


def resume(state: State) -> list[Effect]:
    """The effects that were under way when the daemon ended; adapters may repeat each of them."""
    return [
        _run(change, at)
        for change in running(state)
        for at, step in enumerate(change.steps)
        if step.state is StepState.RUNNING and step.name in BY_ADAPTER and _has(state, change, step.server)
    ]


def renumber(state: State) -> State:
    """The state after its revision jumped over one that somebody else had published: what was asked waits for ours."""
    for change in running(state):
        steps = tuple(
            replace(s, revision=state.revision) if s.revision and s.state is StepState.RUNNING else s
            for s in change.steps
        )
        state = _put(state, replace(change, steps=steps))
    return state


def finish(state: State, event: StepDone, now: float) -> tuple[State, list[Effect]]:
    """Take note of what an adapter did. A report for a step that is not running is old, and changes nothing."""
    change = state.changes.get(event.change)
    if change is None or change.steps[event.step].state is not StepState.RUNNING:
        return state, []
    step = change.steps[event.step]
    step = replace(step, state=StepState.DONE, ended=now, detail=event.detail, master=event.master or step.master)
    steps = _with(change.steps, event.step, step)
    if step.name is StepName.EXIT and event.gone:
        steps = _skip(steps, step.server, "not needed", now, only=StepName.KILL)
    state = _put(state, replace(change, steps=steps))
    if step.name is StepName.START and _has(state, change, step.server):
        return peers.started(state, change.upstream, step.server)
    return state, []


def fail(state: State, event: StepFailed, now: float) -> State:
    """Take note that an adapter could not do a step."""
    change = state.changes.get(event.change)
    if change is None or change.steps[event.step].state is not StepState.RUNNING:
        return state
    step = change.steps[event.step]
    if step.name in _HOOKS and _has(state, change, step.server):
        down = state.groups[change.upstream].peers[step.server].health is Health.DOWN
        if change.forced or (down and step.name is not StepName.AFTER_UP):
            why = "as it is forced" if change.forced else "as the server is down"
            return _settle(state, change, event.step, StepState.DONE, f"{event.message}; proceeding {why}", now)
    return _fail(state, change, event.step, event.message, now)


def progress(state: State, now: float, seen: PeerSeen | None = None) -> tuple[State, list[Effect]]:
    """Move every running change as far as it can go by what is known now."""
    effects: list[Effect] = []
    for change in running(state):
        state, more = _progress(state, change.id, now, seen)
        effects += more
    return state, effects


def _progress(state: State, number: int, now: float, seen: PeerSeen | None) -> tuple[State, list[Effect]]:
    effects: list[Effect] = []
    moved = True
    while moved:
        moved = False
        change = state.changes[number]
        if change.upstream not in state.groups:
            if not state.configured:
                return state, effects
            state, more = _end(state, replace(change, error=f"{change.upstream} is gone from nginx.conf"), now)
            return state, effects + more
        for at in _current(change):
            before = state
            state, more = _advance(state, number, at, now, seen)
            effects += more
            moved = moved or state is not before
        if not _current(state.changes[number]):
            state, more = _end(state, state.changes[number], now)
            return state, effects + more
    return state, effects


def _current(change: Change) -> list[int]:
    """The step that is due for each server of the first batch that has not ended. After a failure no batch begins."""
    open_steps = [(at, step) for at, step in enumerate(change.steps) if step.state not in _ENDED]
    if not open_steps:
        return []
    batch = open_steps[0][1].batch
    failed = any(step.state is StepState.FAILED and step.batch < batch for step in change.steps)
    if failed:
        return []
    due: dict[str, int] = {}
    for at, step in open_steps:
        if step.batch == batch:
            due.setdefault(step.server, at)
    return list(due.values())


def _advance(state: State, number: int, at: int, now: float, seen: PeerSeen | None) -> tuple[State, list[Effect]]:
    """Begin a step that is due, or judge one that is under way."""
    change = state.changes[number]
    step = change.steps[at]
    if step.server not in state.groups[change.upstream].peers:
        return _fail(state, change, at, f"{step.server} is gone from nginx.conf", now), []
    if step.state is StepState.PENDING:
        return _begin_step(state, change, at, now)
    if step.name in _JUDGES:
        mine = seen if seen and (seen.upstream, seen.server) == (change.upstream, step.server) else None
        return _JUDGES[step.name](state, change, at, now, mine), []
    return state, []


def _begin_step(state: State, change: Change, at: int, now: float) -> tuple[State, list[Effect]]:
    step = replace(change.steps[at], state=StepState.RUNNING, started=now)
    group = state.groups[change.upstream]
    if step.name in (StepName.TERMINATE, StepName.EXIT, StepName.KILL):
        master = _of(change, step.server, StepName.FIND).master
        if master is None:
            return _settle(state, change, at, StepState.SKIPPED, "no process was running", now), []
        step = replace(step, master=master)
    if step.name is StepName.DRAIN:
        if not change.forced:
            try:
                refuse_emptying(group, [step.server])
            except Refused as refused:
                return _fail(state, change, at, f"{refused.message} ({refused.remedy})", now), []
        step = replace(step, admin=group.peers[step.server].admin)
        state = peers.drain(state, change.upstream, step.server, now)
        step = replace(step, revision=state.revision)
    elif step.name is StepName.EMPTY:
        # The table of the drain, or the later one that let go of the sessions too.
        step = replace(step, revision=max(s.revision for s in change.steps if s.server == step.server))
    state = _put(state, replace(change, steps=_with(change.steps, at, step)))
    effects: list[Effect] = [_note(change, "step", f"change {change.id}: {step.server}: {step.name}", step.server)]
    if step.name in BY_ADAPTER:
        effects.append(_run(state.changes[change.id], at))
    if step.name is StepName.UP:
        effects.append(ProbeNow(change.upstream, step.server))
    return state, effects


# --- judging the steps that no adapter carries out ---------------------------------------------------------------


def _judge_drain(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy.drain
    if not state.plane.error and state.plane.revision >= step.revision:
        return _settle(state, change, at, StepState.DONE, f"published as revision {step.revision}", now)
    if now - (step.started or now) < policy.timeout:
        return state
    why = f"nginx did not take the table within {policy.timeout:g} s: {state.plane.error or 'it serves an older one'}"
    if policy.on_timeout == "proceed":
        return _settle(state, change, at, StepState.DONE, f"{why}; proceeding as drain.on_timeout says", now)
    return _fail(state, change, at, why, now)


def _judge_sessions(state: State, change: Change, at: int, now: float, seen: PeerSeen | None) -> State:
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy.sticky
    late = now - (_of(change, step.server, StepName.DRAIN).started or now) >= policy.drain
    if seen and seen.requests != step.requests:
        step = replace(step, requests=seen.requests, quiet=now)
        state = _put(state, replace(change, steps=_with(change.steps, at, step)))
    idle = step.quiet is not None and now - step.quiet >= policy.idle
    if not late and not idle:
        return state
    why = f"no session asked for {policy.idle:g} s" if idle else f"sessions move after {policy.drain:g} s"
    state = peers.end_sessions(state, change.upstream, step.server)
    change = state.changes[change.id]
    steps = _with(change.steps, at, replace(step, revision=state.revision))
    return _settle(state, replace(change, steps=steps), at, StepState.DONE, why, now)


def _judge_empty(state: State, change: Change, at: int, now: float, seen: PeerSeen | None) -> State:
    step, policy = change.steps[at], state.groups[change.upstream].upstream.policy.drain
    requested = _of(change, step.server, StepName.DRAIN).started or now
    verdict = drain.verdict(policy, requested, step.revision, seen, now)
    if verdict is drain.Verdict.WAIT:
        return state
    if verdict is drain.Verdict.EMPTY:
        return _settle(state, change, at, StepState.DONE, "no request in flight", now)
    left = f"{seen.in_flight} requests still in flight" if seen else "requests in flight unknown: nginx does not answer"
    why = f"{left} after {policy.timeout:g} s"
    if verdict is drain.Verdict.PROCEED:
        return _settle(state, change, at, StepState.DONE, f"{why}; proceeding as drain.on_timeout says", now)
    return _fail(state, change, at, why, now)


def _judge_settle(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    wait = state.groups[change.upstream].upstream.policy.drain.settle
    drained = _of(change, change.steps[at].server, StepName.DRAIN)
    if now - (drained.ended or now) < wait:
        return state
    return _settle(state, change, at, StepState.DONE, f"{wait:g} s after deregistration", now)


def _judge_up(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, group = change.steps[at], state.groups[change.upstream]
    peer, limit = group.peers[step.server], group.upstream.policy.rollout.up_timeout
    if peer.health is Health.UP:
        return _settle(state, change, at, StepState.DONE, "probes passed", now)
    if now - (step.started or now) >= limit:
        why = peer.reason or "no probe has passed"
        return _fail(state, change, at, f"not up within {limit:g} s: {why}", now)
    return state


def _judge_warm(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, group = change.steps[at], state.groups[change.upstream]
    peer, policy = group.peers[step.server], group.upstream.policy.warm_up
    warm = peer.warm_up
    if peer.health is Health.DOWN:
        return _fail(state, change, at, f"went down while warming: {peer.reason}", now)
    if not warmup.active(warm):
        return _settle(state, change, at, StepState.DONE, f"warm after {now - (step.started or now):.1f} s", now)
    if warm.phase is Warmth.WAITING and now - warm.since >= policy.duration:
        return _settle(state, change, at, StepState.DONE, f"no request came in {policy.duration:g} s", now)
    if warm.phase is Warmth.HELD and warm.elapsed <= 0 and now - warm.since >= 2 * policy.step_back:
        return _fail(state, change, at, f"does not warm up: {warm.why}", now)
    detail = ""
    if warm.phase is Warmth.HELD:
        detail = f"held: {warm.why}"
    elif warm.phase is Warmth.QUEUED:
        detail = "waits until others are warm"
    if detail == step.detail:
        return state
    return _put(state, replace(change, steps=_with(change.steps, at, replace(step, detail=detail))))


def _judge_hold(state: State, change: Change, at: int, now: float, _: PeerSeen | None) -> State:
    step, group = change.steps[at], state.groups[change.upstream]
    peer, wait = group.peers[step.server], group.upstream.policy.rollout.ready_time
    if peer.health is Health.DOWN:
        return _fail(state, change, at, f"went down within its minimum ready time: {peer.reason}", now)
    if now - (step.started or now) < wait:
        return state
    return _settle(state, change, at, StepState.DONE, f"ready for {wait:g} s", now)


_JUDGES: dict[StepName, Callable[[State, Change, int, float, PeerSeen | None], State]] = {
    StepName.DRAIN: _judge_drain,
    StepName.SESSIONS: _judge_sessions,
    StepName.EMPTY: _judge_empty,
    StepName.SETTLE: _judge_settle,
    StepName.UP: _judge_up,
    StepName.WARM: _judge_warm,
    StepName.HOLD: _judge_hold,
}


# --- small parts --------------------------------------------------------------------------------------------------


def _settle(state: State, change: Change, at: int, outcome: StepState, detail: str, now: float) -> State:
    step = change.steps[at]
    step = replace(step, state=outcome, started=now if step.started is None else step.started, ended=now, detail=detail)
    return _put(state, replace(change, steps=_with(change.steps, at, step)))


def _fail(state: State, change: Change, at: int, why: str, now: float) -> State:
    """The step has failed: its server's later steps are skipped, and a server not yet told to stop gets back its place.

    An operator's own drain is the exception: the server stays out, for that is what was asked. Where hooks were called
    since the server would leave, and it stays, those of `after_up` are called.
    """
    step = change.steps[at]
    ended = replace(
        step, state=StepState.FAILED, started=now if step.started is None else step.started, ended=now, detail=why
    )
    steps = _skip(_with(change.steps, at, ended), step.server, "", now)
    if (step.name in _REVERSIBLE or step.name is StepName.BEFORE_DRAIN) and _has(state, change, step.server):
        steps = _call_back(steps, step.server, bool(state.groups[change.upstream].upstream.policy.hooks.after_up))
    state = _put(state, replace(change, steps=steps, error=change.error or f"{step.server}: {step.name}: {why}"))
    if step.name in _REVERSIBLE and change.kind is not ChangeKind.DRAIN and _has(state, change, step.server):
        found = _of(change, step.server, StepName.DRAIN).admin
        state = peers.set_admin(state, change.upstream, step.server, found or Admin.READY, now)
    return state


def _end(state: State, change: Change, now: float) -> tuple[State, list[Effect]]:
    steps = tuple(s if s.state in _ENDED else replace(s, state=StepState.SKIPPED, ended=now) for s in change.steps)
    status = ChangeStatus.FAILED if change.error else ChangeStatus.DONE
    state = _put(state, replace(change, status=status, ended=now, steps=steps))
    if change.kind is ChangeKind.STOP and status is ChangeStatus.DONE:
        for server in dict.fromkeys(step.server for step in steps):
            state = peers.set_admin(state, change.upstream, server, Admin.MAINT, now)
    text = f"change {change.id}: {change.kind} of {change.upstream} {status} after {now - change.created:.1f} s"
    return state, [_note(change, "change", f"{text}: {change.error}" if change.error else text)]


def _put(state: State, change: Change) -> State:
    changes = {**state.changes, change.id: change}
    ended = [number for number in sorted(changes) if changes[number].status is not ChangeStatus.RUNNING]
    for number in ended[:-_KEPT]:
        del changes[number]
    return replace(state, changes=changes)


def _with(steps: tuple[Step, ...], at: int, step: Step) -> tuple[Step, ...]:
    return (*steps[:at], step, *steps[at + 1 :])


def _skip(
    steps: tuple[Step, ...], server: str, detail: str, now: float, only: StepName | None = None
) -> tuple[Step, ...]:
    """Skip that server's steps that are still pending, or `only` the one of that name."""
    return tuple(
        replace(s, state=StepState.SKIPPED, ended=now, detail=detail)
        if s.server == server and s.state is StepState.PENDING and only in (None, s.name)
        else s
        for s in steps
    )


def _call_back(steps: tuple[Step, ...], server: str, hooks: bool) -> tuple[Step, ...]:
    """Steps that end by calling `after_up`, where the server's `before_drain` has been called."""
    mine = {step.name: at for at, step in enumerate(steps) if step.server == server}
    told = mine.get(StepName.BEFORE_DRAIN)
    if not hooks or told is None or steps[told].started is None:
        return steps
    again = Step(StepName.AFTER_UP, server, steps[told].batch)
    at = mine.get(StepName.AFTER_UP)
    return (*steps, again) if at is None else _with(steps, at, again)


def _of(change: Change, server: str, name: StepName) -> Step:
    """That server's step of this name."""
    return next(s for s in change.steps if s.server == server and s.name is name)


def _has(state: State, change: Change, server: str) -> bool:
    group = state.groups.get(change.upstream)
    return group is not None and server in group.peers


def _run(change: Change, at: int) -> RunStep:
    step = change.steps[at]
    return RunStep(change.id, at, step.name, change.upstream, step.server, step.master)


def _note(change: Change, kind: str, text: str, server: str = "") -> Note:
    return Note(kind, text, change.upstream, server, change.id)
