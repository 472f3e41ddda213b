"""What happened between two readings of nginx's counters, to each server and to several together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from controller.core.model import Readings, State, Traffic


def between(earlier: Readings, later: Readings) -> dict[str, Traffic]:
    """Each server's counts of that time; servers that one of the readings does not know are left out.

    Counters begin anew with another nginx, and with a server that left and came back: neither gives a difference.
    """
    if earlier.boot != later.boot:
        return {}
    counts = {}
    for key, new in later.servers.items():
        old = earlier.servers.get(key)
        if old is not None and new.requests >= old.requests:
            counts[key] = Traffic(
                new.requests - old.requests,
                max(0, new.answered - old.answered),
                max(0, new.errors - old.errors),
                max(0, new.failures - old.failures),
                max(0, new.timeouts - old.timeouts),
                max(0.0, new.seconds - old.seconds),
            )
    return counts


def together(counts: Iterable[Traffic]) -> Traffic:
    """The sum of what became of the tries of several servers."""
    every = tuple(counts)
    return Traffic(
        answered=sum(each.answered for each in every),
        errors=sum(each.errors for each in every),
        failures=sum(each.failures for each in every),
        seconds=sum(each.seconds for each in every),
    )


def ended(counts: Traffic) -> int:
    """How many tries came to an end, with an answer or without."""
    return counts.answered + counts.failures


def error_rate(counts: Traffic) -> float:
    """The share of the ended tries that were answered 5xx or not at all; 0 where none has ended."""
    return (counts.errors + counts.failures) / max(1, ended(counts))


def mean(counts: Traffic) -> float:
    """The mean response time of what was answered, in seconds; 0 where nothing was."""
    return counts.seconds / max(1, counts.answered)


def anew(state: State, upstream: str) -> State:
    """The state in which the budget of this upstream is judged from the next reading on."""
    group = state.groups.get(upstream)
    if group is None or group.measured is None:
        return state
    return replace(state, groups={**state.groups, upstream: replace(group, measured=None)})
