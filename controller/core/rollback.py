"""A change that goes back: every server that has what the change brought gets what it had before, the last one first.

First the servers under way are brought to where they can be taken back; then the change gets further steps, those of
a `roll-back`, in batches that follow its own in reverse order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from controller.core.events import ChangeWished, Note
from controller.core.model import Change, ChangeKind, ChangeStatus, Group, Refused, State, Step, StepName, StepState
from controller.core.policy import Policy
from controller.core.steps import EMPTYING, ENDED, ENDING, REVERSIBLE, nearest, note, put, steps_of, undoes
from controller.core.stopping import leave_out

#: The step with which a server has what the change brings; kinds that are not here bring nothing new.
BRINGS = {
    ChangeKind.DEPLOY: StepName.DEPLOY,
    ChangeKind.ROLLOUT: StepName.START,
    ChangeKind.RESTART: StepName.START,
    ChangeKind.RELOAD: StepName.RELOAD,
    ChangeKind.UPGRADE: StepName.UPGRADE,
}


class Recorded(Protocol):
    """A step, of a change in memory or of the record of one that has ended."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def server(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102


def refuse_unable(kind: ChangeKind, upstream: str, policy: Policy, code: str = "invalid") -> None:
    """Refused where a change of this kind cannot be rolled back, or headgate.toml does not say how.

    The `code` of one that was granted is `busy`: it stands as it is.
    """
    if kind not in BRINGS:
        message = f"a {kind} brings no new version that could be rolled back"
        raise Refused(code, message, f"leave it, or roll back what is there with `headgate roll-back {upstream}`")
    if policy.process is None or not policy.process.roll_back:
        message = f"no command roll_back is configured for {upstream}"
        raise Refused(code, message, f"set roll_back in [upstream.{upstream}.process]")


def wanted(kind: ChangeKind, upstream: str, wish: bool | None, policy: Policy) -> bool:
    """Whether a change goes back when it fails: as it was wished, else as `rollout.on_failure` says; Refused where
    that cannot be."""
    if wish is None:
        wish = policy.rollout.on_failure == "roll-back" and kind in BRINGS
    if wish:
        refuse_unable(kind, upstream, policy)
    return wish


def changed(kind: ChangeKind, steps: Iterable[Recorded]) -> tuple[str, ...]:
    """The servers that have what a change of this kind brought, the last one first."""
    done = [step for step in steps if step.state == StepState.DONE]
    back = {step.server for step in done if step.name == StepName.ROLL_BACK}
    brought = dict.fromkeys(s.server for s in done if s.name == BRINGS[kind] and s.server not in back)
    return tuple(reversed(brought))


def of_ended(number: int, kind: ChangeKind, steps: Iterable[Recorded], group: Group) -> ChangeWished:
    """The wish to roll back a change that has ended, as a change of its own; Refused where there is nothing of it."""
    name = group.upstream.name
    refuse_unable(kind, name, group.upstream.policy, "busy")
    servers = tuple(server for server in changed(kind, steps) if server in group.peers)
    if not servers:
        message = f"no server of {name} has anything of change {number} any more"
        raise Refused("busy", message, f"roll back what is there with `headgate roll-back {name}`")
    return ChangeWished(ChangeKind.ROLL_BACK, name, servers)


def begins(change: Change) -> bool:
    """Whether the change has failed, and has still to turn round."""
    return change.roll_back and bool(change.error) and change.status in (ChangeStatus.RUNNING, ChangeStatus.PAUSED)


def turn(state: State, change: Change, now: float) -> tuple[State, Note]:
    """The change goes back from here on. A server that waits is not begun, and one that only drains gets its place
    back; of one that was told to stop no more is done than has to be done before it is taken back."""
    why = f": {change.error}" if change.error else ""
    state = put(state, replace(change, status=ChangeStatus.ROLLING_BACK, roll_back=True))
    failed = {step.server for step in change.steps if step.state is StepState.FAILED}
    for server in dict.fromkeys(step.server for step in change.steps):
        if server not in failed:  # of those no more is left than belongs to their failure
            names = set(StepName) - set(ENDING)
            state = leave_out(state, state.changes[change.id], server, names, "the change goes back", now)
    return state, note(change, "change", f"change {change.id}: {change.kind} of {change.upstream} is rolled back{why}")


def with_undo(change: Change, group: Group) -> Change:
    """The change with the steps that take it back, once nothing of it is under way any more."""
    back = max(step.batch for step in change.steps) + 1
    batches: dict[int, list[str]] = {}
    for step in change.steps:
        batches.setdefault(step.batch, [])
        if step.server in group.peers and step.server not in batches[step.batch]:
            batches[step.batch].append(step.server)
    steps = tuple(
        Step(name, server, back + at)
        for at, batch in enumerate(sorted(batches, reverse=True))
        for server in reversed(batches[batch])
        for name in _undo(change, server, group.upstream.policy)
    )
    return replace(change, steps=(*change.steps, *steps), back=back)


def _undo(change: Change, server: str, policy: Policy) -> tuple[StepName, ...]:
    """The steps of a roll back that this server needs: all while its process runs, else those from where it is."""
    mine = [step for step in change.steps if step.server == server]
    names = {step.name: step for step in mine}
    every = steps_of(ChangeKind.ROLL_BACK, policy)
    if StepName.ROLL_BACK in names:
        return ()  # a failed deploy has tried it already
    brought, started = names[BRINGS[change.kind]], names.get(StepName.START)
    if brought.state is StepState.DONE or (brought.state is StepState.FAILED and brought.name not in REVERSIBLE):
        runs = started is None or started.state is StepState.DONE
        return every if runs else every[every.index(StepName.ROLL_BACK) :]
    told = any(step.started is not None and step.name not in EMPTYING for step in mine)
    if started is None or not told or any(step.state is StepState.FAILED for step in mine):
        return ()
    return every[every.index(StepName.START if change.kind is ChangeKind.DEPLOY else StepName.ROLL_BACK) :]


def outcome(change: Change) -> str:
    """What a change that ends has taken back, as the end of a sentence; empty where it did not try."""
    steps = [step for step in change.steps if undoes(change, step)]
    for step in steps:
        if step.state is StepState.FAILED:
            return f"; the roll back failed at {step.server}: {step.name}: {step.detail}"
    if steps and (change.status is ChangeStatus.ABORTING or any(step.state not in ENDED for step in steps)):
        return "; the roll back was not finished"
    # A deploy that only stops takes its failed servers back by themselves, and the last one of them comes last.
    last = len(change.steps) - 1
    alone = change.steps[last].state is StepState.DONE and nearest(change, last, StepName.ROLL_BACK) is not None
    return "; rolled back" if steps or (alone and change.kind is ChangeKind.DEPLOY) else ""
