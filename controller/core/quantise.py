"""The routing table in what plain nginx can say: integer weights, `down` marks, and few ramp steps.

nginx knows no weight below 1, forgets its balancing at each reload, and each reload costs keep-alive clients a
connection. So a ramp goes up in stairs, and stairs that fall due together go up in one reload. When to reload, and the
lines as they stand in a file, do not stand here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from controller.core.warmup import formula

STEPS = 4  # stairs of a ramp
_SCALE = 100  # a share is reckoned in hundredths
_HASHES = frozenset({"hash", "ip_hash"})

Key = tuple[str, str]
"""(upstream, server key)."""


class Unsayable(Exception):
    """nginx's `server` lines cannot express this; the message says what, and where."""


# --- ramps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ramp:
    """A warm-up in stairs: `elapsed` seconds had passed at `since`; `shown` is the share that nginx serves, if it does.

    The share is that of the formula in controller/core/warmup.py at the beginning of each stair, so a server never has
    more than the formula gives it. A ramp with fewer `steps` of its own than nginx is given takes those. `ended`: the
    table knows it no more, the full weight is due.
    """

    epoch: int
    duration: float
    curve: float
    floor: float
    held: bool
    elapsed: float
    since: float
    shown: float | None = None
    ended: bool = False
    steps: int = 0

    def time(self, now: float) -> float:
        """Seconds that the warm-up has run."""
        return self.elapsed + (0.0 if self.held else max(0.0, now - self.since))

    def share(self, now: float, steps: int) -> float:
        """The part of the full weight at this time, in 0..1, where nginx is given at most so many stairs."""
        steps = self._stairs(steps)
        return self._stair(self._number(now, steps), steps)

    def next_step(self, now: float, steps: int) -> float | None:
        """When `shown` is to be followed by a greater share: `now` or before where that is overdue, None: never."""
        steps = self._stairs(steps)
        shown = self._stair(self._number(now, steps), steps) if self.shown is None else self.shown
        if shown >= 1.0:
            return None
        if self.ended:
            return self.since
        stair = next(number for number in range(steps + 1) if self._stair(number, steps) > shown)
        at = self.since + stair * self.duration / steps - self.elapsed
        return None if self.held and at > self.since else at

    def _stairs(self, steps: int) -> int:
        return min(self.steps or steps, steps)

    def _number(self, now: float, steps: int) -> int:
        if self.ended or self.duration <= 0:
            return steps
        return min(steps, max(0, math.floor(steps * self.time(now) / self.duration + 1e-9)))

    def _stair(self, number: int, steps: int) -> float:
        return formula(number / steps, self.curve, self.floor, self.steps)


def follow(ramps: Mapping[Key, Ramp], table: Mapping[str, Any], now: float) -> dict[Key, Ramp]:
    """The ramps of a new table. One that runs goes on by its own clock unless its epoch or its hold has changed; while
    it is held the table's clock counts.

    A ramp that the table ends is one stair from its end, and takes it like any other stair: with the next reload.
    """
    followed = {}
    for name, upstream in table["upstreams"].items():
        for server in upstream["servers"]:
            key, wanted = (name, server["key"]), server.get("warm_up")
            ramp = ramps.get(key)
            if wanted is None:
                if ramp is not None and ramp.shown is not None and ramp.shown < 1.0:
                    followed[key] = ramp if ramp.ended else replace(ramp, ended=True, since=now)
                continue
            elapsed, since = wanted["elapsed_ms"] / 1000, now
            known = ramp is not None and ramp.epoch == wanted["epoch"]
            if ramp is not None and known and not ramp.ended and not wanted["held"] and not ramp.held:
                elapsed, since = ramp.elapsed, ramp.since
            followed[key] = Ramp(
                wanted["epoch"],
                wanted["duration_ms"] / 1000,
                wanted["curve"],
                wanted["floor"],
                wanted["held"],
                elapsed,
                since,
                ramp.shown if ramp is not None and known else None,
                steps=wanted.get("steps") or 0,
            )
    return followed


def shares(ramps: Mapping[Key, Ramp], now: float, steps: int = STEPS) -> dict[Key, float]:
    """Every ramp's share at this time."""
    return {key: ramp.share(now, steps) for key, ramp in ramps.items()}


def shown(ramps: Mapping[Key, Ramp], now: float, steps: int = STEPS) -> dict[Key, float]:
    """Every ramp's share as nginx serves it; of those that nginx does not know yet, the share at this time."""
    return {key: ramp.share(now, steps) if ramp.shown is None else ramp.shown for key, ramp in ramps.items()}


def with_shown(ramps: Mapping[Key, Ramp], shares: Mapping[Key, float]) -> dict[Key, Ramp]:
    """The ramps now that nginx serves these shares."""
    return {key: replace(ramp, shown=shares[key]) for key, ramp in ramps.items()}


# --- pace ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """When reloads may come: `interval` seconds apart; for ramps alone a third of a stair apart, so that the stairs of
    many servers fall together and none comes later than that."""

    interval: float = 2.0
    steps: int = STEPS

    def due(self, asked: bool, ramps: Mapping[Key, Ramp], last: float, now: float) -> float | None:
        """When the next reload is due, whose predecessor was at `last`; None while there is nothing to do.

        `asked`: a table waits that nginx does not serve yet.
        """
        times = [last + self.interval] if asked else []
        for ramp in ramps.values():
            at = ramp.next_step(now, self.steps)
            if at is not None:
                times.append(max(at, last + max(self.interval, ramp.duration / self.steps / 3)))
        return min(times, default=None)


# --- lines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """A `server` line as its author wrote it, and the table's peers that it stands for (several: a host name's).

    `counted`: it takes part in the weight of its peers (a `down` twin, or a `backup` beside a primary, does not).
    """

    place: str
    keys: tuple[str, ...]
    weight: int = 1
    down: bool = False
    backup: bool = False
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """What the line of these servers is to say. `weight` None: what its author wrote.

    `survivor`: `max_fails=0`, else what its author wrote.
    """

    keys: tuple[str, ...]
    weight: int | None
    down: bool
    survivor: bool = False


def quantise(
    method: str, upstream: Mapping[str, Any], lines: Sequence[Line], shares: Mapping[str, float]
) -> tuple[Setting, ...]:
    """A setting for each line of an upstream of the table; `shares` has each server's warm-up share by key. Unsayable.

    - Weights are integers on the smallest common base, apart for primaries and backups, and only where the shares of
      the lines differ; else every line says what its author wrote.
    - A line that the table does not know is `down`: a server that nobody has probed does not serve.
    - Where only one of several lines is left, nginx would still take it away after `max_fails` failures, for it counts
      those that are down: the last one gets `max_fails=0`.
    - `hash` and `ip_hash` count the weights of all lines: one that changes moves nearly every client to another
      server. There `down` is all that is said, and a warm-up has no stairs.
    - All lines may be `down`: nginx takes that, and answers 502, as the table means it.
    """
    servers = {server["key"]: server for server in upstream["servers"]}
    down = [line.down or not _serves(line, servers, upstream["fail_open"]) for line in lines]
    weights: list[int | None] = [None] * len(lines)
    if method not in _HASHES:
        for backup in (False, True):
            group = [at for at, line in enumerate(lines) if line.backup is backup and line.counted and not down[at]]
            for at, weight in zip(group, _weights([lines[at] for at in group], lines, servers, shares), strict=True):
                weights[at] = weight
    live = [at for at in range(len(lines)) if not down[at]]
    last = live[0] if len(live) == 1 and len(lines) > 1 and len(lines[live[0]].keys) == 1 else None
    return tuple(Setting(line.keys, weights[at], down[at], at == last) for at, line in enumerate(lines))


def _serves(line: Line, servers: Mapping[str, Mapping[str, Any]], fail_open: bool) -> bool:
    states = [servers[key]["state"] for key in line.keys if key in servers]
    serving = [state == "up" or (fail_open and state == "down") for state in states]
    if any(serving) and not all(serving) and {"drain", "sessions", "maint"}.intersection(states):
        raise Unsayable(
            f"{line.place} stands for {', '.join(line.keys)}, and nginx takes all of them or none; "
            "drain them together, or write a line for each address"
        )
    return any(serving)


def _weights(
    group: Sequence[Line],
    lines: Sequence[Line],
    servers: Mapping[str, Mapping[str, Any]],
    shares: Mapping[str, float],
) -> list[int | None]:
    """Weights for these lines: the table's weight of the server, split over its lines, times the share."""
    wanted = []
    for line in group:
        together = sum(other.weight for other in lines if other.counted and other.keys == line.keys)
        known = [key for key in line.keys if key in servers]
        full = min(Fraction(servers[key]["weight"]).limit_denominator(1000) for key in known)
        part = min(Fraction(round(shares[key] * _SCALE), _SCALE) for key in known)
        wanted.append(full * Fraction(line.weight, together) * max(part, Fraction(1, _SCALE)))
    factors = {weight / line.weight for weight, line in zip(wanted, group, strict=True)}
    if len(factors) < 2:
        return [None] * len(group)
    base = math.lcm(*(weight.denominator for weight in wanted))
    whole = [int(weight * base) for weight in wanted]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]
