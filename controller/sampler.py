"""From nginx's counters, which only grow, to what each server got in each second. Values only; who stores them stands
in runtime.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from controller.ports import Counters, PeerCounters, TrafficRecord

LEAST = 0.9  # seconds between two readings that are compared
MOST = 60.0  # seconds between two readings after which nobody knows any more when the requests came


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    boot: str
    servers: Mapping[str, PeerCounters]


class Sampler:
    """Compares each reading of an upstream with the one before, and holds the seconds until somebody takes them."""

    def __init__(self) -> None:
        self._last: dict[str, _Reading] = {}
        self._rows: list[TrafficRecord] = []

    def read(self, counters: Counters, now: float, wall: float) -> None:
        """Take note of a reading; `now` is the monotonic clock, `wall` seconds since the epoch.

        What was counted since the last reading is spread evenly over the seconds between. Counters begin anew with
        another nginx, and with a server that left and came back: neither gives a difference.
        """
        for upstream, servers in counters.upstreams.items():
            last = self._last.get(upstream)
            if last and last.boot == counters.boot and now - last.at < LEAST:
                continue
            self._last[upstream] = _Reading(now, counters.boot, servers)
            if last is None or last.boot != counters.boot or now - last.at > MOST:
                continue
            for key, new in servers.items():
                old = last.servers.get(key)
                if old and new.requests >= old.requests:
                    self._spread(upstream, key, old, new, now - last.at, wall)

    def take(self) -> tuple[TrafficRecord, ...]:
        """The seconds since this was called last. Two may be of one server and second: their counts add up."""
        rows, self._rows = self._rows, []
        return tuple(rows)

    def _spread(self, upstream: str, key: str, old: PeerCounters, new: PeerCounters, span: float, wall: float) -> None:
        requests = new.requests - old.requests
        answered, errors, failures = (
            max(0, new.answered - old.answered),
            max(0, new.errors - old.errors),
            max(0, new.failures - old.failures),
        )
        if not (requests or answered or failures or new.in_flight):
            return
        seconds = max(0.0, new.seconds - old.seconds)
        begin = wall - span
        for second in range(math.floor(begin), math.ceil(wall)):
            part = (min(wall, second + 1) - max(begin, second)) / span
            counts = (part * requests, part * answered, part * errors, part * failures, part * seconds)
            self._rows.append(TrafficRecord(upstream, key, second, *counts, new.in_flight))
