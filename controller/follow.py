"""Follows nginx: brings it to the newest table, reads its counters, and turns what they say into events."""

from __future__ import annotations

import asyncio
from typing import Protocol

from controller.core import change, table, warmup
from controller.core.events import Event, Outcome, PeerSeen, PlaneLost, PlaneSeen, TableRefused, TrafficSeen
from controller.core.model import Admin, Ejection, Group, Peer, State, StepName, StepState, Traffic
from controller.ports import Clock, Counters, DataPlane, PeerCounters, PlaneRefused, PlaneUnreachable
from controller.sampler import Sampler

IDLE = 1.0  # seconds between two looks at nginx while a change runs or a server warms up
LOOK = 2.0  # the same while nothing is going on
DRAINING = 0.02  # the same while a server empties
RETRY = (0.05, 2.0)  # seconds to wait after a failure: first, and at most
_DRIFT = 1.0  # seconds by which two readings of one ejection's end may differ


class Owner(Protocol):
    """Who owns the State: the runtime."""

    state: State
    version: int
    clock: Clock

    def post(self, event: Event) -> None:
        """Tell what happened; nobody waits for it."""

    async def tell(self, event: Event) -> Outcome:
        """Tell what happened, and return when the state follows it."""

    async def changed(self, after: int, seconds: float) -> int:
        """The version, as soon as it differs from `after`, or after `seconds`."""


class Follower:
    """The loops between the State and one nginx. `counters` are the last that were read."""

    def __init__(self, owner: Owner, plane: DataPlane) -> None:
        self.counters = Counters(boot="", revision=0)
        self.sampler = Sampler()
        self._owner = owner
        self._plane = plane
        self._traffic: dict[str, dict[str, Traffic]] = {}  # as it was last told
        self._sent = 0  # the revision of the last table that was sent, unless nginx refused it

    async def publish(self) -> None:
        """Bring nginx to the newest table, whatever happened to the ones between; for ever."""
        owner, wait = self._owner, RETRY[0]
        while True:
            version, plane = owner.version, owner.state.plane
            if plane.error or plane.revision >= owner.state.revision or not owner.state.configured:
                await owner.changed(version, 60.0)
                continue
            newest = table.table(owner.state, owner.clock.now())
            self._sent = owner.state.revision
            try:
                status = await self._plane.publish(newest)
                await owner.tell(PlaneSeen(status.boot, status.revision))
                wait = RETRY[0]
            except PlaneUnreachable as error:
                await owner.tell(PlaneLost(str(error)))
            except PlaneRefused as error:
                self._sent = 0
                if error.code == "stale_revision" and error.revision:
                    await owner.tell(PlaneSeen(plane.boot, error.revision, ours=False))
                else:
                    await owner.tell(TableRefused(str(error)))
                await asyncio.sleep(wait)
                wait = min(wait * 2, RETRY[1])

    async def watch(self) -> None:
        """Read the counters: now and then, and often while a server empties; for ever."""
        while True:
            version = self._owner.version
            emptying = self._emptying()
            await self.look(emptying)
            if emptying:
                await asyncio.sleep(DRAINING)
            else:
                await self._until_emptying(version)

    async def look(self, upstreams: tuple[str, ...] = ()) -> None:
        """Read the counters once; of all upstreams, unless exactly one is named."""
        try:
            if len(upstreams) == 1:
                counters = await self._read(upstreams[0])
            else:
                counters = self.counters = await self._plane.counters()
        except (PlaneUnreachable, PlaneRefused) as error:
            self._owner.post(PlaneLost(str(error)))
            return
        self.sampler.read(counters, self._owner.clock.now(), self._owner.clock.wall())
        plane = self._owner.state.plane
        if plane.error or (plane.boot, plane.revision) != (counters.boot, counters.revision):
            self._owner.post(PlaneSeen(counters.boot, counters.revision, ours=counters.revision == self._sent))
        for name, group in self._owner.state.groups.items():
            self._tell_of(name, group, counters)

    async def emptied(self, upstream: str, keys: tuple[str, ...], revision: int, seconds: float) -> dict[str, int]:
        """Requests in flight at these servers, by key, once there are none or after `seconds`.

        Only a reading of a table of this revision or a later one counts; PlaneUnreachable, PlaneRefused.
        """
        deadline = self._owner.clock.now() + seconds
        while True:
            counters = await self._read(upstream)
            seen = counters.upstreams.get(upstream, {})
            native = counters.native.get(upstream, 0)
            left = {key: seen[key].in_flight + native if key in seen else 0 for key in keys}
            current = counters.revision >= revision
            if (current and not any(left.values())) or self._owner.clock.now() >= deadline:
                return left
            await asyncio.sleep(DRAINING)

    async def _read(self, upstream: str) -> Counters:
        """The counters of one upstream, kept beside those that were read of the others."""
        counters = await self._plane.counters(upstream)
        self.counters = Counters(
            counters.boot,
            counters.revision,
            {**self.counters.upstreams, **counters.upstreams},
            {**self.counters.native, **counters.native},
        )
        return counters

    def _tell_of(self, name: str, group: Group, counters: Counters) -> None:
        servers: dict[str, Traffic] = {}
        told = self._traffic.get(name, {})
        for key, seen in counters.upstreams.get(name, {}).items():
            peer = group.peers.get(key)
            if peer is None:
                continue
            servers[key] = _traffic(seen, peer, self._owner.clock.now())
            if peer.admin is Admin.DRAIN or peer.held or warmup.active(peer.warm_up):
                in_flight = seen.in_flight + counters.native.get(name, 0)
                warm = (seen.warm_epoch, seen.warm_elapsed, seen.warm_started)
                self._owner.post(PeerSeen(name, key, counters.revision, in_flight, *warm, requests=seen.requests))
        if servers != told or any(warmup.active(peer.warm_up) for peer in group.peers.values()):
            # What is read while nginx lags behind our table may not be followed, so it is told again.
            self._traffic[name] = servers if counters.revision >= self._owner.state.revision else {}
            self._owner.post(TrafficSeen(name, counters.boot, servers))

    async def _until_emptying(self, version: int) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + (LOOK if self._quiet() else IDLE)
        while (left := end - loop.time()) > 0 and not self._emptying():
            version = await self._owner.changed(version, left)

    def _quiet(self) -> bool:
        """Whether nothing goes on that nginx counts for us: no change, no warm-up."""
        state = self._owner.state
        return not change.running(state) and not any(
            warmup.active(peer.warm_up) for group in state.groups.values() for peer in group.peers.values()
        )

    def _emptying(self) -> tuple[str, ...]:
        """The upstreams in which a change waits for requests in flight."""
        return tuple(
            {
                name: None
                for each in change.running(self._owner.state)
                for s in each.steps
                if s.name is StepName.EMPTY and s.state is StepState.RUNNING
                for name in (each.upstream, *(mate.upstream for mate in s.mates))
            }
        )


def _traffic(seen: PeerCounters, peer: Peer, now: float) -> Traffic:
    ejected = None
    if seen.ejected:
        ejected = Ejection(now + seen.ejected.remaining, seen.ejected.reason, seen.ejected.times)
        known = peer.ejected
        if (
            known
            and (known.reason, known.times) == (ejected.reason, ejected.times)
            and abs(known.until - ejected.until) < _DRIFT
        ):
            ejected = known
    return Traffic(
        seen.requests,
        seen.answered,
        seen.errors,
        seen.failures,
        seen.timeouts,
        seen.seconds,
        ejected,
        seen.refused_marks,
        seen.warm_epoch,
        seen.warm_picked,
    )
