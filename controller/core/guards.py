"""What may not be taken away: the last server that serves, and more than the others are to carry."""

from __future__ import annotations

from collections.abc import Sequence

from controller.core import shared, table
from controller.core.model import Change, ChangeKind, Group, Refused, Server, State, StepName

TOLERANCE = 1e-6
"""By which a reckoned load may be above a limit."""


def usual(group: Group) -> dict[str, float]:
    """The part of the requests that each server gets when all primaries serve; of a backup, a primary of its weight."""
    total = weight(group)
    return {s.key: s.weight / total for s in group.upstream.servers}


def weight(group: Group) -> int:
    """The weight of all primaries that are to serve."""
    primaries: list[Server] = [s for s in group.upstream.servers if not s.backup and not s.down]
    return sum(s.weight for s in primaries or group.upstream.servers)


def batches(change: Change) -> list[tuple[str, ...]]:
    """The servers that go at once, batch by batch."""
    found: dict[int, dict[str, None]] = {}
    for step in change.steps:
        found.setdefault(step.batch, {})[step.server] = None
    return [tuple(batch) for batch in found.values()]


def refuse(state: State, change: Change) -> None:
    """Refused when this change would leave no server that serves, or one with too much.

    Of a batch no more are away at once than `max_unavailable`: the heaviest ones, at the worst.
    """
    if change.forced or all(step.name is not StepName.DRAIN for step in change.steps):
        return
    away: tuple[str, ...] = ()
    for batch in batches(change):
        if any(step.name is StepName.UP for step in change.steps):
            away = _heaviest(state.groups[change.upstream], batch, change.max_unavailable)
        else:  # those of the batches before do not come back
            away += batch
        for group, keys in concerned(state, change, away):
            refuse_emptying(group, keys)
            # Whoever restarts a single server wants that one, as with a stop.
            if change.kind in _IN_BATCHES or (change.kind is ChangeKind.RESTART and len(batch) > 1):
                refuse_overload(group, keys, change.rate if group.upstream.name == change.upstream else None)


def concerned(state: State, change: Change, keys: Sequence[str]) -> list[tuple[Group, tuple[str, ...]]]:
    """Each upstream that servers leave when this change takes these away, with those; its own comes first."""
    mates = {} if change.kind is ChangeKind.DRAIN else shared.mates(state, change.upstream, keys)
    own = (state.groups[change.upstream], (*keys, *mates.pop(change.upstream, ())))
    return [own, *((state.groups[name], each) for name, each in mates.items())]


_IN_BATCHES = frozenset(ChangeKind) - {ChangeKind.DRAIN, ChangeKind.STOP, ChangeKind.START, ChangeKind.RESTART}


def _heaviest(group: Group, keys: Sequence[str], most: int) -> tuple[str, ...]:
    """At most so many of these servers (0: all), those that serve and have the most weight."""
    if not most or most >= len(keys):
        return tuple(keys)
    serving = set(table.serving(group))
    weights = {s.key: s.weight for s in group.upstream.servers}
    return tuple(sorted(keys, key=lambda key: (key not in serving, -weights[key]))[:most])


def refuse_emptying(group: Group, keys: Sequence[str], otherwise: str = "insist with --force") -> None:
    """Refused when taking these servers away leaves no server that gets traffic, and one does now."""
    if table.in_traffic(group) and not table.in_traffic(group, without=keys):
        raise Refused(
            "guard",
            f"{', '.join(keys)}: no other server of {group.upstream.name} serves",
            f"bring another one up first, or {otherwise}",
        )


def refuse_overload(group: Group, keys: Sequence[str], rate: float | None = None) -> None:
    """Refused when without these servers another one gets more than `rollout.max_load` times its usual share, or more
    than it can take at `rate` requests a second.

    Reckoned, not simulated, so that it costs nothing: while they are away, those that serve share their load by their
    weights. A simulation finds the same.
    """
    name, policy, shares = group.upstream.name, group.upstream.policy.rollout, usual(group)
    rest = set(table.serving(group, without=keys))
    primaries = {s.key for s in group.upstream.servers if not s.backup}
    there = (rest & primaries) or rest
    carries, left = sum(shares[key] for key in there), sum(s.weight for s in group.upstream.servers if s.key in there)
    if not left:
        return
    without, said = f"without {', '.join(keys)} each other server of {name}", ""
    if policy.max_load and 1 / carries > policy.max_load + TOLERANCE:
        setting, said = "max_load", f"gets {1 / carries:.2f} times its usual share, and max_load is {policy.max_load:g}"
    elif policy.capacity and rate and rate / left > policy.capacity + TOLERANCE:
        asked = f"is asked for {rate / left:.0f} requests/s by weight 1"
        setting, said = "capacity", f"{asked}, and capacity is {policy.capacity:g}"
    if said:
        raise Refused(
            "guard",
            f"{without} {said}",
            f"take fewer away at once (`headgate plan rollout {name}` recommends a batch), raise {setting} in "
            f"[upstream.{name}.rollout], or insist with --force",
        )


def ahead(state: State, upstream: str) -> list[Change]:
    """The changes that are in the way of another one that handles processes of this upstream, oldest first."""
    changes = [each for _, each in sorted(state.changes.items()) if not each.status.ended]
    found = [each for each in changes if each.kind is not ChangeKind.DRAIN]
    names = shared.linked(state, upstream) if found else ()
    return [each for each in found if each.upstream in names]


def freed(state: State, upstream: str) -> State:
    """The state as if these changes had ended well: what they stop is stopped, the rest serves and is warm."""
    for change in ahead(state, upstream):
        state = shared.freed(state, change)
    return state
