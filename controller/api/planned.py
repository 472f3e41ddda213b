"""A change as it was foreseen and as it went: shapes only."""

from __future__ import annotations

from pydantic import BaseModel


class ForeseenView(BaseModel):
    """What was planned when the change was begun: seconds in all, the least part of the upstream's weight and the least
    number of servers that serve (`before` did then), and the highest multiple of its usual share that a server gets, at
    `rate` requests a second (null: not known)."""

    duration: float
    capacity: float
    serving: int
    before: int
    load: float
    server: str
    rate: float | None


class HappenedView(BaseModel):
    """What was observed. `load` is null where too few requests came while a server was away."""

    duration: float
    serving: int
    load: float | None
    server: str
    rate: float
