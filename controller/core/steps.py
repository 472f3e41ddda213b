"""Which steps each kind of change has, who carries them out, and how a step ends.

Only the tables and what touches a single change's steps belong here: when a step begins stands in change.py, when one
that no adapter carries out is over in judges.py.
"""

from __future__ import annotations

from dataclasses import replace

from controller.core import peers, shared
from controller.core.events import Note, RunStep
from controller.core.model import Change, ChangeKind, Group, State, Step, StepName, StepState
from controller.core.policy import Policy

EMPTYING = (
    StepName.FIND,
    StepName.BEFORE_DRAIN,
    StepName.DRAIN,
    StepName.NOTIFY,
    StepName.SESSIONS,
    StepName.EMPTY,
    StepName.AFTER_DRAIN,
    StepName.SETTLE,
)
ENDING = (StepName.TERMINATE, StepName.EXIT, StepName.KILL)
OFFLINE = EMPTYING + ENDING
BACK = (StepName.UP, StepName.AFTER_UP, StepName.WARM, StepName.HOLD)
ONLINE = (StepName.START, *BACK)

#: The steps of each kind of change, for each of its servers, in order.
STEPS: dict[ChangeKind, tuple[StepName, ...]] = {
    ChangeKind.DRAIN: (StepName.DRAIN, StepName.NOTIFY, StepName.SESSIONS, StepName.EMPTY),
    ChangeKind.STOP: OFFLINE,
    ChangeKind.START: ONLINE,
    ChangeKind.RESTART: OFFLINE + ONLINE,
    ChangeKind.ROLLOUT: OFFLINE + ONLINE,
    ChangeKind.RELOAD: (*EMPTYING, StepName.RELOAD, StepName.WORKERS, *BACK),
    ChangeKind.UPGRADE: (*EMPTYING, StepName.UPGRADE, *ENDING, *BACK),
    ChangeKind.DEPLOY: (*OFFLINE, StepName.DEPLOY, *ONLINE),
    ChangeKind.ROLL_BACK: (*OFFLINE, StepName.ROLL_BACK, *ONLINE),
    ChangeKind.SCALE: (*EMPTYING, StepName.SCALE, *BACK),
    ChangeKind.SCALE_OUT: (StepName.ADD, *ONLINE),
    ChangeKind.SCALE_IN: (*OFFLINE, StepName.REMOVE),
    ChangeKind.RESET: (*OFFLINE, StepName.RESET, *ONLINE),
}

#: What a server goes through when a deploy has failed at it: before its new process ran, and with it running.
UNDO = (StepName.ROLL_BACK, StepName.START, StepName.UP, StepName.AFTER_UP)
UNDO_RUNNING = (
    StepName.FIND,
    StepName.BEFORE_DRAIN,
    StepName.DRAIN,
    StepName.SESSIONS,
    StepName.EMPTY,
    StepName.AFTER_DRAIN,
    *ENDING,
    *UNDO,
)

#: What a new server goes through when a scale-out has failed at it, or was aborted: with its process running.
TAKING_OUT = (*EMPTYING, *ENDING, StepName.REMOVE)

#: Steps that edit nginx.conf: their server need not stand there.
EDITS = frozenset({StepName.ADD, StepName.REMOVE})

#: Kinds that an upstream without process settings can have: then the steps of processes are left out.
WITHOUT_PROCESS = frozenset({ChangeKind.DRAIN, ChangeKind.SCALE_OUT, ChangeKind.SCALE_IN})

HOOKS = frozenset({StepName.BEFORE_DRAIN, StepName.AFTER_DRAIN, StepName.AFTER_UP})

#: Steps that an adapter carries out; the others are judged, from what is seen.
BY_ADAPTER = frozenset(
    {
        *HOOKS,
        StepName.FIND,
        StepName.NOTIFY,
        *ENDING,
        StepName.DEPLOY,
        StepName.ROLL_BACK,
        StepName.RELOAD,
        StepName.WORKERS,
        StepName.UPGRADE,
        StepName.SCALE,
        StepName.START,
        *EDITS,
    }
)

#: Judged, while an adapter watches that the process lives: it can fail the step, and never ends it well.
WATCHED = frozenset({StepName.UP})

#: Steps before which a server has not been told to stop: when one of them fails, it gets back what it had.
REVERSIBLE = frozenset({*EMPTYING, StepName.TERMINATE, StepName.UPGRADE, StepName.SCALE}) - {
    StepName.FIND,
    StepName.BEFORE_DRAIN,
}

#: Whose process a step is about: of the nearest earlier step of these names.
MASTER_OF: dict[StepName, tuple[StepName, ...]] = {
    **dict.fromkeys((*ENDING, StepName.RELOAD, StepName.UPGRADE, StepName.SCALE), (StepName.FIND,)),
    StepName.WORKERS: (StepName.RELOAD,),
    StepName.UP: (StepName.START, StepName.UPGRADE, StepName.WORKERS, StepName.SCALE),
}

#: Kinds that need the old process gone and no other in its place, before their command runs or they are done. For the
#: others it is as well that somebody else has started a new one.
ALONE = frozenset({ChangeKind.STOP, ChangeKind.SCALE_IN, ChangeKind.DEPLOY, ChangeKind.ROLL_BACK})

#: Kinds that need a gunicorn master, and one that runs.
GUNICORN = frozenset({ChangeKind.RELOAD, ChangeKind.UPGRADE, ChangeKind.SCALE})

ENDED = frozenset({StepState.DONE, StepState.FAILED, StepState.SKIPPED})


def steps_of(kind: ChangeKind, policy: Policy) -> tuple[StepName, ...]:
    """The steps of this kind of change, without those that are switched off."""
    return _wanted(STEPS[kind], policy)


def _wanted(names: tuple[StepName, ...], policy: Policy) -> tuple[StepName, ...]:
    off = set()
    if not policy.notices.enabled:
        off.add(StepName.NOTIFY)
    if not policy.sticky.cookie:
        off.add(StepName.SESSIONS)
    off |= {name for name in HOOKS if not getattr(policy.hooks, name)}
    if policy.process is None:
        off |= {StepName.FIND, *ENDING, StepName.START}
    if policy.hooks.register_at == "warm" and StepName.WARM in names and StepName.AFTER_UP not in off:
        warm = names.index(StepName.WARM) + 1
        before = tuple(name for name in names[:warm] if name is not StepName.AFTER_UP)
        names = (*before, StepName.AFTER_UP, *names[warm:])
    return tuple(name for name in names if name not in off)


def undoes(change: Change, step: Step) -> bool:
    """Whether the step takes back what the change has done."""
    return 0 < change.back <= step.batch


def has_begun(change: Change, server: str) -> bool:
    """Whether the change has begun to do anything with this server."""
    return any(step.server == server and step.state is not StepState.PENDING for step in change.steps)


def with_step(change: Change, at: int, step: Step) -> Change:
    """The change with another step there."""
    return replace(change, steps=(*change.steps[:at], step, *change.steps[at + 1 :]))


def put(state: State, change: Change) -> State:
    """The state with this change in place of the one of its number."""
    return replace(state, changes={**state.changes, change.id: change})


def nearest(change: Change, at: int, *names: StepName) -> Step | None:
    """The last step of one of these names up to step `at`, of its server."""
    server = change.steps[at].server
    return next((s for s in reversed(change.steps[: at + 1]) if s.server == server and s.name in names), None)


def in_vain(change: Change, since: float, now: float) -> float:
    """Seconds that somebody has waited `since` a time for others, without the change getting on meanwhile."""
    moved = (at for step in change.steps for at in (step.started, step.ended) if at is not None)
    return now - max([since, *moved])


def settle(state: State, change: Change, at: int, outcome: StepState, detail: str, now: float) -> State:
    """The step has ended so."""
    return put(state, with_step(change, at, end(change.steps[at], outcome, detail, now)))


def end(step: Step, outcome: StepState, detail: str, now: float) -> Step:
    """The step as it is when it has ended so."""
    started = now if step.started is None else step.started
    return replace(step, state=outcome, started=started, ended=now, detail=detail)


def skip(change: Change, server: str, detail: str, now: float, *only: StepName) -> Change:
    """Skip that server's steps that are still pending, all or those of these names."""
    return replace(
        change,
        steps=tuple(
            replace(s, state=StepState.SKIPPED, ended=now, detail=detail)
            if s.server == server and s.state is StepState.PENDING and (not only or s.name in only)
            else s
            for s in change.steps
        ),
    )


def fail(state: State, change: Change, at: int, why: str, now: float) -> State:
    """The step has failed: its server's later steps are skipped, and a server not yet told to stop gets back its place.

    An operator's own drain is the exception: the server stays out, for that is what was asked. Where a deploy can be
    rolled back, or a new server taken out again, the steps that do so here are added, unless the change goes back as a
    whole. Where hooks were called since the server would leave, and it stays, those of `after_up` are called.
    """
    step = change.steps[at]
    change = with_step(change, at, end(step, StepState.FAILED, why, now))
    change = skip(change, step.server, "", now)
    change = replace(change, error=change.error or f"{step.server}: {step.name}: {why}")
    group = state.groups.get(change.upstream)
    if group is None:
        return put(state, change)
    change = replace(change, steps=(*change.steps, *_undo(change, at, group)))
    if step.server not in group.peers:
        return put(state, change)
    if step.name in REVERSIBLE | {StepName.BEFORE_DRAIN}:
        change = call_back(change, step.server, group.upstream.policy)
    state = put(state, change)
    if step.name in REVERSIBLE and change.kind is not ChangeKind.DRAIN:
        state = give_back(state, change, at, now)
    return state


def give_back(state: State, change: Change, at: int, now: float) -> State:
    """The server of this step gets back what it had before it was drained, and so do its mates."""
    drained = nearest(change, at, StepName.DRAIN)
    if drained is None or drained.admin is None:
        return state
    state = shared.release(state, change.id, drained.mates)
    return peers.set_admin(state, change.upstream, drained.server, drained.admin, now)


def call_back(change: Change, server: str, policy: Policy) -> Change:
    """The change with steps that end by calling `after_up`, where the server's `before_drain` has been called."""
    mine = {step.name: at for at, step in enumerate(change.steps) if step.server == server}
    told = mine.get(StepName.BEFORE_DRAIN)
    if not policy.hooks.after_up or told is None or change.steps[told].started is None:
        return change
    again = Step(StepName.AFTER_UP, server, change.steps[told].batch)
    at = mine.get(StepName.AFTER_UP)
    return replace(change, steps=(*change.steps, again)) if at is None else with_step(change, at, again)


def take_out(change: Change, server: str, policy: Policy, now: float) -> Change:
    """The change with steps that end with the new server gone again, in place of those that had not begun."""
    mine = {step.name: at for at, step in enumerate(change.steps) if step.server == server}
    if StepName.REMOVE in mine:
        return change
    change = skip(change, server, "aborted", now)
    for name in BACK:
        if name in mine and name is not StepName.AFTER_UP and change.steps[mine[name]].state is StepState.RUNNING:
            change = with_step(change, mine[name], end(change.steps[mine[name]], StepState.SKIPPED, "aborted", now))
    ran = StepName.START not in mine or change.steps[mine[StepName.START]].started is not None
    names = TAKING_OUT if ran else (StepName.REMOVE,)
    batch = change.steps[mine[StepName.ADD]].batch
    return replace(change, steps=(*change.steps, *(Step(name, server, batch) for name in _wanted(names, policy))))


def _undo(change: Change, at: int, group: Group) -> tuple[Step, ...]:
    failed, policy = change.steps[at], group.upstream.policy
    early = failed.name in (StepName.DEPLOY, StepName.ADD, StepName.START)  # nothing new runs yet
    if not early and (failed.name not in BACK or failed.name is StepName.AFTER_UP):
        return ()
    names: tuple[StepName, ...] = ()
    if change.kind is ChangeKind.DEPLOY and policy.process and policy.process.roll_back:
        if not (change.roll_back or nearest(change, at, StepName.ROLL_BACK)):
            names = UNDO if early else UNDO_RUNNING
    elif change.kind is ChangeKind.SCALE_OUT:
        names = (StepName.REMOVE,) if early or failed.server not in group.peers else TAKING_OUT
    return tuple(Step(name, failed.server, failed.batch) for name in _wanted(names, policy))


def run(change: Change, at: int) -> RunStep:
    """The effect that has an adapter carry out this step."""
    step = change.steps[at]
    alone = change.kind in ALONE and step.name in ENDING
    return RunStep(
        *(change.id, at, step.name, change.upstream, step.server),
        *(step.master, change.workers, alone, change.weight),
    )


def note(change: Change, kind: str, text: str, server: str = "") -> Note:
    """A sentence about this change."""
    return Note(kind, text, change.upstream, server, change.id)
