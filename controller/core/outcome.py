"""What a change did to its upstream, in the terms in which a plan foresaw it: from its recorded steps and traffic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from controller.core.model import StepName

LEAST = 150
"""Requests of the whole upstream in which a share is measured, so that chance is a small part of it."""


@dataclass(frozen=True, slots=True)
class Happened:
    """What was observed: the change took `duration` seconds, at least `serving` servers served, and in LEAST requests
    that came one after another `server` got up to `load` times its usual share (None and empty: too few requests came
    while a server was away); in all the upstream got `rate` requests a second."""

    duration: float
    serving: int
    load: float | None
    server: str
    rate: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A recorded step: times are seconds since the epoch, None where it did not begin or end."""

    name: str
    server: str
    began: float | None
    ended: float | None


def happened(
    began: float,
    ended: float,
    before: int,
    steps: Sequence[Stage],
    traffic: Mapping[int, Mapping[str, float]],
    usual: Mapping[str, float],
) -> Happened:
    """Judge a change between two times, `before` which so many servers served.

    `traffic` has the requests of each second, by server; `usual` the part of the requests that each gets when all
    serve.
    """
    away = list(_away(steps, ended))
    longest = max((until - since for since, until in away), default=0.0)
    load, server = _peak(traffic, usual, range(int(began), int(ended) + 1), longest)
    total = sum(sum(each.values()) for each in traffic.values())
    duration = ended - began
    return Happened(duration, before - _together(away), load, server, total / duration if duration > 0 else 0.0)


def _away(steps: Sequence[Stage], ended: float) -> Iterable[tuple[float, float]]:
    """From when to when each server was taken away: until its probes passed again, or it got its place back. A change
    that goes back takes it away again."""
    for server in dict.fromkeys(step.server for step in steps):
        mine = [step for step in steps if step.server == server and step.began is not None]
        while again := _back(mine):
            yield from _away(mine[:again], ended)
            mine = mine[again:]
        since = next((step.began for step in mine if step.name == StepName.DRAIN), None)
        if since is None:
            continue
        back = [step.ended for step in mine if step.name == StepName.UP and step.ended]
        last = back or [step.ended or ended for step in mine]
        told = any(step.name in (StepName.TERMINATE, StepName.RELOAD) for step in mine)
        yield since, ended if told and not back else max(last)


def _back(mine: Sequence[Stage]) -> int:
    """Where the steps of a server begin that take it away anew, after it had passed its probes; 0: nowhere."""
    passed = False
    for at, step in enumerate(mine):
        if passed and step.name == StepName.FIND:
            return at
        passed = passed or step.name == StepName.WARM
    return 0


def _together(away: Sequence[tuple[float, float]]) -> int:
    """The most that were away at one time."""
    return max((sum(since <= at < until for since, until in away) for at, _ in away), default=0)


def _peak(
    traffic: Mapping[int, Mapping[str, float]], usual: Mapping[str, float], seconds: range, longest: float
) -> tuple[float | None, str]:
    """The highest multiple of its usual share that a server got in a window of LEAST requests, and which.

    A window is as many whole seconds as it takes, beginning with each. One that is longer than any server was away
    says nothing of that time.
    """
    peak: tuple[float | None, str] = (None, "")
    counts: dict[str, float] = {}
    total, begin = 0.0, seconds.start
    for at in seconds:
        for server, requests in traffic.get(at, {}).items():
            counts[server] = counts.get(server, 0.0) + requests
            total += requests
        while begin < at and total - (first := sum(traffic.get(begin, {}).values())) >= LEAST:
            for server, requests in traffic.get(begin, {}).items():
                counts[server] -= requests
            total, begin = total - first, begin + 1
        if total < LEAST or at + 1 - begin > max(1.0, longest):
            continue
        for server, requests in counts.items():
            if usual.get(server) and (load := requests / total / usual[server]) > (peak[0] or 0.0):
                peak = load, server
    return peak
