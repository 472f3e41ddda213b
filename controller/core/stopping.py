"""What is left out of a change that is stopped or aborted: of a server that waits, drains, or was told to stop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from controller.core.events import Note
from controller.core.judges import JUDGES
from controller.core.model import Change, State, StepName, StepState
from controller.core.steps import EMPTYING, ENDED, HOOKS, call_back, end, give_back, note, put, with_step


def stop(state: State, change: Change, why: str, now: float) -> tuple[State, Note]:
    """The change fails, and begins no further server: those under way come to their end.

    One that was not yet told to stop gets its place back; a deploy command that has not begun is left out.
    """
    change = replace(change, error=change.error or why)
    state = put(state, change)
    for server in dict.fromkeys(step.server for step in change.steps):
        state = leave_out(state, state.changes[change.id], server, {StepName.DEPLOY}, "the change was stopped", now)
    return state, note(change, "change", f"change {change.id}: {change.kind} of {change.upstream} stops: {why}")


def leave_out(state: State, change: Change, server: str, names: Collection[StepName], why: str, now: float) -> State:
    """Leave these steps out of what the change has still to do with a server, and all where it was not told to stop:
    then it gets its place back.

    Of the steps under way only those are ended that nobody outside is busy with.
    """
    mine = [at for at, step in enumerate(change.steps) if step.server == server and step.batch >= change.back]
    begun = [at for at in mine if change.steps[at].state is not StepState.PENDING]
    if all(change.steps[at].state in ENDED for at in mine):
        return state
    untouched = all(change.steps[at].name in EMPTYING for at in begun)
    for at in mine:
        step = change.steps[at]
        waits = step.state is StepState.PENDING
        if step.state is StepState.RUNNING and _dispensable(step.name, names, untouched):
            change = with_step(change, at, end(step, StepState.SKIPPED, why, now))
        elif waits and (untouched or step.name in names):
            change = with_step(change, at, replace(step, state=StepState.SKIPPED, ended=now, detail=why))
    group = state.groups.get(change.upstream)
    if not untouched or not begun or group is None or server not in group.peers:
        return put(state, change)
    change = call_back(change, server, group.upstream.policy)
    return give_back(put(state, change), change, begun[-1], now)


def _dispensable(name: StepName, names: Collection[StepName], untouched: bool) -> bool:
    """Whether a step that is under way is ended. Whoever is being called may still get it, whatever we do: a
    deregistration that was given up could come behind the registration."""
    return (name in names and name in JUDGES) or (untouched and name not in HOOKS | {StepName.NOTIFY})
