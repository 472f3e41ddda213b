"""Every operation as recorded steps: which there are, when each begins, and what ends it.

A change can be interrupted between any two events. What a step has done is in the state before the next one begins,
so that a daemon that was killed derives from the state where it was and goes on (`resume`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from controller.core import guards, members, peers, rollback, shared, table, traffic
from controller.core.events import (
    ChangeWished,
    Effect,
    Outcome,
    PeerSeen,
    ProbeNow,
    StepDone,
    StepFailed,
)
from controller.core.judges import JUDGES
from controller.core.model import (
    Admin,
    Change,
    ChangeKind,
    ChangeStatus,
    Group,
    Health,
    Mate,
    Refused,
    State,
    Step,
    StepName,
    StepState,
)
from controller.core.policy import Policy
from controller.core.steps import (
    BY_ADAPTER,
    EDITS,
    EMPTYING,
    ENDED,
    GUNICORN,
    HOOKS,
    MASTER_OF,
    STEPS,
    WATCHED,
    WITHOUT_PROCESS,
    fail,
    has_begun,
    in_vain,
    nearest,
    note,
    put,
    run,
    settle,
    skip,
    steps_of,
    undoes,
    with_step,
)

_KEPT = 50  # ended changes that stay in memory; the store has them all


def begin(state: State, wish: ChangeWished, now: float) -> tuple[State, Outcome]:
    """Record a change and begin it, or queue it where that was asked; Refused where the wish cannot be granted.

    Without servers it takes every server that is ready, in the order of nginx.conf; a roll back goes the other way.
    """
    group = group_of(state, wish.upstream)
    freed = state if wish.kind is ChangeKind.DRAIN else guards.freed(state, wish.upstream)
    keys = members.coming(group, wish) if wish.kind is ChangeKind.SCALE_OUT else resolve(group, wish.servers)
    if wish.kind is ChangeKind.SCALE_IN:
        keys = members.going(group, keys)
    if not keys:
        ready = freed.groups[wish.upstream].peers
        keys = tuple(s.key for s in group.upstream.servers if not s.down and ready[s.key].admin is Admin.READY)
        if not keys:
            raise Refused("invalid", f"{wish.upstream} has no server that is ready", "name the servers, or enable one")
        if wish.kind is ChangeKind.ROLL_BACK:
            keys = keys[::-1]
    _refuse_unknown(wish, group.upstream.policy)
    if wish.kind not in (ChangeKind.DRAIN, ChangeKind.SCALE_OUT):
        keys = shared.once(group, keys)
    comes_back = {StepName.DRAIN, StepName.UP} <= set(STEPS[wish.kind])
    size = wish.batch or (1 if comes_back else len(keys))
    names = steps_of(wish.kind, group.upstream.policy)
    steps = tuple(Step(name, key, at // size) for at, key in enumerate(keys) for name in names)
    change = Change(
        state.next_change,
        wish.kind,
        wish.upstream,
        steps,
        now,
        wish.forced,
        max_unavailable=wish.max_unavailable,
        workers=wish.workers,
        roll_back=rollback.wanted(wish.kind, wish.upstream, wish.roll_back, group.upstream.policy),
        foreseen=wish.foreseen,
        rate=wish.rate,
        batch=size,
        weight=wish.weight,
    )
    effects: list[Effect] = []
    what = f"change {change.id}: {wish.kind} of {', '.join(keys)} in {wish.upstream}"
    try:
        state, effects = claim(state, wish.upstream, keys, wish.kind is not ChangeKind.DRAIN, now)
        state, change = _measured(state, change)
        effects.append(note(change, "change", f"{what} begins"))
    except Refused as refused:
        if not wish.queue or refused.code != "busy":
            raise
        change = replace(change, status=ChangeStatus.QUEUED)
        effects.append(note(change, "change", f"{what} is queued: {refused.message}"))
    guards.refuse(freed, change)
    state = _kept(put(replace(state, next_change=change.id + 1), change))
    state, more = progress(state, now)
    return state, Outcome((*effects, *more), change.id)


def _measured(state: State, change: Change) -> tuple[State, Change]:
    """The change with what its upstream did until now, where it begins: its budget is judged from here on."""
    return traffic.anew(state, change.upstream), replace(change, before=state.groups[change.upstream].usual)


def _refuse_unknown(wish: ChangeWished, policy: Policy) -> None:
    """Refused where headgate.toml lacks what this kind of change needs, or the wish has what it does not know."""
    if wish.workers and wish.kind is not ChangeKind.SCALE:
        raise Refused("invalid", f"{wish.kind} leaves the number of workers as it is", "use scale, or leave it out")
    process, table_name = policy.process, f"[upstream.{wish.upstream}.process]"
    if process is None and wish.kind in WITHOUT_PROCESS:
        return
    if process is None:
        raise Refused(
            "invalid",
            f"headgate does not know the processes of {wish.upstream}",
            f"add {table_name} to headgate.toml, with a unit, a pid_file or a start command",
        )
    command = {ChangeKind.DEPLOY: process.deploy, ChangeKind.ROLL_BACK: process.roll_back}.get(wish.kind, ("",))
    key = wish.kind.value.replace("-", "_")
    if not command:
        raise Refused("invalid", f"no command {key} is configured for {wish.upstream}", f"set {key} in {table_name}")
    if wish.kind in GUNICORN and process.kind != "gunicorn":
        message = f"{wish.kind} speaks to gunicorn, and the processes of {wish.upstream} are of kind {process.kind}"
        raise Refused("invalid", message, "use restart or rollout")
    if wish.kind is ChangeKind.UPGRADE and process.unit:
        message = f"systemd would end {process.unit} together with its old master"
        raise Refused("invalid", message, "use restart or rollout, or reload where the code alone is new")
    if wish.kind is ChangeKind.SCALE and wish.workers < 1:
        raise Refused("invalid", "a gunicorn master has at least one worker", "say how many with --workers")


def group_of(state: State, upstream: str) -> Group:
    """The upstream's group; Refused, with the names that there are."""
    if upstream not in state.groups and not state.configured:
        why = state.config_error or "it is being read"
        raise Refused("unread", f"nginx.conf has not been read yet: {why}", "correct it; it is taken up by itself")
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


def claim(state: State, upstream: str, keys: Sequence[str], processes: bool, now: float) -> tuple[State, list[Effect]]:
    """Make way for a new wish about these servers.

    A drain gives way to what is wished later of its server. Any other change keeps its servers, in whatever upstream
    their processes stand, and while it runs no second one may handle processes of the upstream, or of one that has
    some of them, too: Refused.
    """
    effects: list[Effect] = []
    linked: frozenset[str] | None = None
    for change in running(state):
        if change.kind is ChangeKind.DRAIN:
            if change.upstream == upstream and {step.server for step in change.steps} & set(keys):
                change = replace(change, status=ChangeStatus.SUPERSEDED, error="another wish took its place")
                state, more = _end(state, change, now)
                effects += more
            continue
        if processes and linked is None:
            linked = shared.linked(state, upstream)
        if change.upstream in (linked or ()) or shared.meet(state, change, upstream, keys):
            raise Refused(
                "busy",
                f"change {change.id} ({change.kind}) of {change.upstream} is {_IS[change.status]}",
                f"follow it with `headgate changes {change.id}` and try again when it has ended, or with --queue",
            )
    return state, effects


def running(state: State) -> list[Change]:
    """The changes that have begun and not ended, oldest first."""
    changes = (change for _, change in sorted(state.changes.items()))
    return [change for change in changes if not change.status.ended and change.status is not ChangeStatus.QUEUED]


def busy(state: State) -> bool:
    """Whether a step is under way."""
    return any(step.state is StepState.RUNNING for change in running(state) for step in change.steps)


def resume(state: State) -> list[Effect]:
    """The effects that were under way when the daemon ended; adapters may repeat each of them."""
    return [
        run(change, at)
        for change in running(state)
        for at, step in enumerate(change.steps)
        if step.state is StepState.RUNNING
        and step.name in BY_ADAPTER | WATCHED
        and (step.name in EDITS or _has(state, change, step.server))
    ]


def renumber(state: State) -> State:
    """The state after its revision jumped over one that somebody else had published: what was asked waits for ours."""
    for change in running(state):
        steps = tuple(
            replace(s, revision=state.revision) if s.revision and s.state is StepState.RUNNING else s
            for s in change.steps
        )
        state = put(state, replace(change, steps=steps))
    return state


def finish(state: State, event: StepDone, now: float) -> State:
    """Take note of what an adapter did. A report for a step that is not running is old, and changes nothing."""
    change = state.changes.get(event.change)
    if change is None or not _reported(change, event.step) or change.steps[event.step].name in JUDGES:
        return state
    step = change.steps[event.step]
    if step.name is StepName.FIND and event.master is None and change.kind in GUNICORN and not undoes(change, step):
        return fail(state, change, event.step, "no process is running (start it instead)", now)
    step = replace(step, state=StepState.DONE, ended=now, detail=event.detail, master=event.master or step.master)
    change = with_step(change, event.step, step)
    if step.name is StepName.EXIT and event.gone:
        change = skip(change, step.server, "not needed", now, StepName.KILL)
    if step.name is StepName.REMOVE:  # whoever comes back to this address is another server
        gone = (change.upstream, step.server)
        state = replace(state, departed={name: each for name, each in state.departed.items() if name != gone})
    if step.name is StepName.FIND and step.master and 0 < len(step.master.workers) <= change.workers:
        # A scale to more workers takes nothing away from anybody.
        change = skip(change, step.server, "not needed", now, *EMPTYING)
    return put(state, change)


def failed(state: State, event: StepFailed, now: float) -> State:
    """Take note that an adapter could not do a step."""
    change = state.changes.get(event.change)
    if change is None or not _reported(change, event.step):
        return state
    step = change.steps[event.step]
    if step.name in HOOKS and _has(state, change, step.server):
        down = state.groups[change.upstream].peers[step.server].health is Health.DOWN
        if change.forced or (down and step.name is not StepName.AFTER_UP):
            why = "as it is forced" if change.forced else "as the server is down"
            return settle(state, change, event.step, StepState.DONE, f"{event.message}; proceeding {why}", now)
    return fail(state, change, event.step, event.message, now)


def _reported(change: Change, at: int) -> bool:
    step = change.steps[at]
    return step.state is StepState.RUNNING and step.name in BY_ADAPTER | WATCHED


def progress(state: State, now: float, seen: PeerSeen | None = None) -> tuple[State, list[Effect]]:
    """Move every change as far as it can go by what is known now, and begin those whose turn has come."""
    effects: list[Effect] = []
    todo = running(state)
    while todo:
        for change in todo:
            if not state.changes[change.id].status.ended:
                state, more = _progress(state, change.id, now, seen)
                effects += more
        state, begun, more = _next_in_queue(state, now)
        effects += more
        todo = [state.changes[begun]] if begun else []
    return state, effects


def _next_in_queue(state: State, now: float) -> tuple[State, int, list[Effect]]:
    """Begin the oldest queued change that nothing is in the way of; its id, or 0. What shares a process with it is not
    known before nginx.conf was read."""
    for number, change in sorted(state.changes.items()):
        if change.status is not ChangeStatus.QUEUED or not state.configured:
            continue
        if change.upstream not in state.groups:
            if _departed(state, change):
                continue
            state, effects = _end(state, replace(change, error=f"{change.upstream} is gone from nginx.conf"), now)
            return state, number, effects
        servers = tuple(dict.fromkeys(step.server for step in change.steps))
        try:
            state, effects = claim(state, change.upstream, servers, change.kind is not ChangeKind.DRAIN, now)
        except Refused:
            continue
        try:
            guards.refuse(state, change)
        except Refused as refused:
            state, more = _end(state, replace(change, error=f"{refused.message} ({refused.remedy})"), now)
            return state, number, effects + more
        state, change = _measured(state, replace(change, status=ChangeStatus.RUNNING))
        state = put(state, change)
        effects.append(note(change, "change", f"change {number}: {change.kind} of {change.upstream} begins"))
        return state, number, effects
    return state, 0, []


def _progress(state: State, number: int, now: float, seen: PeerSeen | None) -> tuple[State, list[Effect]]:
    effects: list[Effect] = []
    moved = True
    while moved:
        moved = False
        change = state.changes[number]
        if change.upstream not in state.groups:
            if not state.configured or _departed(state, change):
                return state, effects
            state, more = _end(state, replace(change, error=f"{change.upstream} is gone from nginx.conf"), now)
            return state, effects + more
        if rollback.begins(change):
            state, said = rollback.turn(state, change, now)
            effects.append(said)
            change = state.changes[number]
        for at in _due(change):
            before = state
            if change.status is not ChangeStatus.PAUSED or has_begun(state.changes[number], change.steps[at].server):
                state, more = _advance(state, number, at, now, seen)
                effects += more
            moved = moved or state is not before
        change = state.changes[number]
        turns = rollback.begins(change)
        moved = moved or turns
        if turns or _due(change):
            continue
        if change.status is not ChangeStatus.ROLLING_BACK or change.back:
            state, more = _end(state, change, now)
            return state, effects + more
        state, moved = put(state, rollback.with_undo(change, state.groups[change.upstream])), True
    return state, effects


def _due(change: Change) -> list[int]:
    """The step that is due for each server of the first batch that has not ended. After a failure no batch begins,
    but those of the way back do: after failures of their own they do not."""
    open_steps = [(at, step) for at, step in enumerate(change.steps) if step.state not in ENDED]
    if not open_steps:
        return []
    batch = min(step.batch for _, step in open_steps)
    if any(step.state is StepState.FAILED and change.back <= step.batch < batch for step in change.steps):
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
    if step.server not in state.groups[change.upstream].peers and step.name not in EDITS:
        return fail(state, change, at, f"{step.server} is gone from nginx.conf", now), []
    if step.state is StepState.PENDING:
        return _begin_step(state, change, at, now)
    if step.name in JUDGES:
        known = {(change.upstream, step.server), *((mate.upstream, mate.server) for mate in step.mates)}
        mine = seen if seen and (seen.upstream, seen.server) in known else None
        return JUDGES[step.name](state, change, at, now, mine), []
    return state, []


def _begin_step(state: State, change: Change, at: int, now: float) -> tuple[State, list[Effect]]:
    step = replace(change.steps[at], state=StepState.RUNNING, started=now)
    group = state.groups[change.upstream]
    effects: list[Effect] = []
    if step.name in MASTER_OF:
        source = nearest(change, at, *MASTER_OF[step.name])
        step = replace(step, master=source.master if source else None)
        if step.master is None and step.name not in WATCHED:
            return settle(state, change, at, StepState.SKIPPED, "no process was running", now), []
    if step.name is StepName.DRAIN:
        if (waits := _waits(change, group, step)) is not None:
            return _wait(state, change, at, waits, now), []
        if not change.forced:
            try:
                for concerned, keys in guards.concerned(state, change, (step.server,)):
                    guards.refuse_emptying(concerned, keys)
            except Refused as refused:
                if undoes(change, step):  # others are on their way back, too
                    return _wait(state, change, at, f"waits: {refused.message}", now), []
                return fail(state, change, at, f"{refused.message} ({refused.remedy})", now), []
        step = replace(step, admin=group.peers[step.server].admin)
        state = peers.drain(state, change.upstream, step.server, now)
        if change.kind is not ChangeKind.DRAIN:
            state, mates, effects = shared.hold(state, change, step.server)
            step = replace(step, mates=mates)
        step = replace(step, revision=state.revision, detail="", quiet=None)
    elif step.name is StepName.EMPTY:
        # The table of the drain, or the later one that let go of the sessions too.
        step = replace(step, revision=max(s.revision for s in change.steps if s.server == step.server))
        drained = nearest(change, at, StepName.DRAIN)
        step = replace(step, mates=(Mate(change.upstream, step.server), *(drained.mates if drained else ())))
    elif step.name is StepName.UP:
        state, effects = peers.started(state, change.upstream, step.server)
        effects.append(ProbeNow(change.upstream, step.server))
        state, more = shared.started(state, change.upstream, step.server)
        effects += more
    elif step.name in (StepName.WARM, StepName.HOLD):
        step = replace(step, taken_out=group.peers[step.server].taken_out)
    change = with_step(change, at, step)
    effects.insert(0, note(change, "step", f"change {change.id}: {step.server}: {step.name}", step.server))
    if step.name in BY_ADAPTER | WATCHED:
        effects.append(run(change, at))
    return put(state, change), effects


def _waits(change: Change, group: Group, step: Step) -> str | None:
    """Why this server cannot be taken away yet, as `max_unavailable` has it. Whom this change took away is there again
    when it is warm: else the load of the next ones would go to cold servers."""
    if not change.max_unavailable:
        return None
    now = [each for each in change.steps if each.batch >= change.back]
    unfinished = {each.server for each in now if each.state not in ENDED}
    taken = {each.server for each in now if each.name is StepName.DRAIN and each.started is not None}
    there = set(table.serving(group)) - (taken & unfinished)
    away = sum(not each.down and each.key not in there for each in group.upstream.servers if each.key != step.server)
    if away < change.max_unavailable:
        return None
    return f"waits: {away} others do not serve, or are not warm yet; at most {change.max_unavailable} may be away"


def _wait(state: State, change: Change, at: int, why: str, now: float) -> State:
    """The step stays pending, for `wait_timeout`; after a failure elsewhere its server is not touched any more."""
    step = change.steps[at]
    if any(each.state is StepState.FAILED and each.batch >= change.back for each in change.steps):
        return put(state, skip(change, step.server, "another server failed", now))
    since = now if step.quiet is None else step.quiet
    limit = state.groups[change.upstream].upstream.policy.rollout.wait_timeout
    if in_vain(change, since, now) >= limit:
        return fail(state, change, at, f"{why}, for {limit:g} s now", now)
    waits = replace(step, detail=why, quiet=since)
    return state if step == waits else put(state, with_step(change, at, waits))


def _end(state: State, change: Change, now: float) -> tuple[State, list[Effect]]:
    """The change is over; its status follows from how, unless it says so already."""
    steps = tuple(s if s.state in ENDED else replace(s, state=StepState.SKIPPED, ended=now) for s in change.steps)
    status, error = change.status, change.error
    if not status.ended:
        by_hand = status is ChangeStatus.ABORTING or (status is ChangeStatus.ROLLING_BACK and not error)
        error = (error or ("by an operator" if by_hand else "")) + rollback.outcome(change)
        if change.kind is ChangeKind.SCALE_OUT and any(s.name is StepName.REMOVE for s in steps if s.started):
            error = f"{error}; taken out again"
        status = ChangeStatus.ABORTED if by_hand else ChangeStatus.FAILED if error else ChangeStatus.DONE
    state = put(state, replace(change, status=status, ended=now, steps=steps, error=error))
    for server in {step.server for step in steps if step.mates}:
        begun = [step for step in steps if step.server == server and step.started is not None]
        if all(step.name in EMPTYING for step in begun):
            state = shared.release(state, change.id, (mate for step in begun for mate in step.mates))
    state = traffic.anew(_kept(state), change.upstream)
    for server in _stopped(state.changes[change.id]):
        if _has(state, change, server):
            state = peers.set_admin(state, change.upstream, server, Admin.MAINT, now)
    text = f"change {change.id}: {change.kind} of {change.upstream} {status} after {now - change.created:.1f} s"
    return state, [note(change, "change", f"{text}: {error}" if error else text)]


def _stopped(change: Change) -> list[str]:
    """The servers that this change has left without a process, on purpose or since their line could not be removed."""
    if change.kind is ChangeKind.STOP and change.status is not ChangeStatus.FAILED:
        return [s.server for s in change.steps if s.name is StepName.TERMINATE and s.started is not None]
    return [s.server for s in change.steps if s.name is StepName.REMOVE and s.state is StepState.FAILED]


def _kept(state: State) -> State:
    """The state without the oldest of the many changes that have ended."""
    ended = [number for number, change in sorted(state.changes.items()) if change.status.ended]
    gone = set(ended[:-_KEPT])
    return replace(state, changes={n: each for n, each in state.changes.items() if n not in gone}) if gone else state


def _departed(state: State, change: Change) -> bool:
    """Whether its upstream may still come back to nginx.conf."""
    return any(name == change.upstream for name, _ in state.departed)


def _has(state: State, change: Change, server: str) -> bool:
    group = state.groups.get(change.upstream)
    return group is not None and server in group.peers


_IS = {
    ChangeStatus.RUNNING: "still running",
    ChangeStatus.PAUSED: "paused",
    ChangeStatus.ABORTING: "being aborted",
    ChangeStatus.ROLLING_BACK: "being rolled back",
}
