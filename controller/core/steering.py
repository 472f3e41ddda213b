"""What people want of a change that is under way: that it pauses, goes on, ends, or goes back."""

from __future__ import annotations

from dataclasses import replace

from controller.core import rollback
from controller.core.events import Effect, SteerWished
from controller.core.model import ChangeKind, ChangeStatus, Refused, State, Steer, StepName
from controller.core.steps import STEPS, has_begun, note, put, take_out
from controller.core.stopping import leave_out


def steer(state: State, wish: SteerWished, now: float) -> tuple[State, list[Effect]]:
    """Pause, resume, abort or roll back a change; Refused where it has ended, or is not in a state for that.

    A paused change begins no further server; those under way come to their end. An aborted one gives servers that
    were not yet told to stop their place back, and brings the others up again; it leaves out what is not needed
    for that. A call to others that is under way comes to its end, so that `after_up` cannot be overtaken by it.
    """
    change = state.changes.get(wish.change)
    if change is None or change.status.ended:
        message = f"there is no change {wish.change} that runs"
        raise Refused("not_found", message, "`headgate changes` lists them and how they ended")
    wanted, fit = {
        Steer.PAUSE: (ChangeStatus.PAUSED, (ChangeStatus.RUNNING,)),
        Steer.RESUME: (ChangeStatus.RUNNING, (ChangeStatus.PAUSED,)),
        Steer.ABORT: (ChangeStatus.ABORTING, (ChangeStatus.RUNNING, ChangeStatus.PAUSED, ChangeStatus.QUEUED)),
        Steer.ROLL_BACK: (ChangeStatus.ROLLING_BACK, (ChangeStatus.RUNNING, ChangeStatus.PAUSED)),
    }[wish.steer]
    # On its way back it can be aborted once its servers are where they can be taken back from.
    if change.status not in fit and not (wish.steer is Steer.ABORT and change.back and not change.status.ended):
        message = f"change {change.id} is {change.status}: it cannot {wish.steer}"
        raise Refused("busy", message, f"follow it with `headgate changes {change.id}`")
    if wish.steer is Steer.ROLL_BACK:
        if change.upstream in state.groups:
            rollback.refuse_unable(change.kind, change.upstream, state.groups[change.upstream].upstream.policy, "busy")
        state, said = rollback.turn(state, change, now)
        return state, [said]
    change = replace(change, status=wanted)
    state = put(state, change)
    if wish.steer is Steer.ABORT:
        names = {StepName.WARM, StepName.HOLD} | ({StepName.DEPLOY, StepName.ROLL_BACK} & set(STEPS[change.kind]))
        for server in dict.fromkeys(step.server for step in change.steps):
            change, group = state.changes[change.id], state.groups.get(change.upstream)
            if change.kind is ChangeKind.SCALE_OUT and group and has_begun(change, server):
                state = put(state, take_out(change, server, group.upstream.policy, now))
            else:
                state = leave_out(state, change, server, names, "aborted", now)
    return state, [note(change, "change", f"change {change.id}: {change.kind} of {change.upstream} is {wanted}")]
