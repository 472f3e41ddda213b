"""The daemon may be killed between any two events: its next life, on what the store kept, reaches the same ends.

At the midpoint all that was not recorded is forgotten, what was goes through a real store, and the next life begins as
the runtime begins it. What happens then is the same.

Equal in the end must be every peer, and every change with the states, details and times of its steps. Different are the
numbers of tables, for a new life begins with a new table. A life that begins later ends later what a change waits for:
its deadlines do not count the time in which nobody could judge. Not recorded, and so left out here, are the readings of
traffic that outliers and ramps are judged by, and the heartbeats of accrual detection: they begin anew.
"""

from __future__ import annotations

import asyncio
import functools
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.adapters.store.sqlite import SqliteStore
from controller.core.events import (
    ChangeWished,
    ConfigRead,
    Event,
    PeerSeen,
    PlaneLost,
    PlaneSeen,
    Restored,
    RunStep,
    SteerWished,
    StepDone,
    StepFailed,
    TrafficSeen,
)
from controller.core.model import (
    Admin,
    Change,
    ChangeKind,
    ChangeStatus,
    Ejection,
    Peer,
    Refused,
    State,
    Steer,
    StepName,
    StepState,
    Traffic,
)
from controller.core.policy import Hook, HookPolicy, NoticePolicy, Policy, ProcessPolicy, StickyPolicy, WarmUpPolicy
from controller.core.step import step
from controller.ports import Delta, Saved
from controller.record import between
from tests.core.test_invariants import HISTORIES, SUSPECTING, Counted
from tests.core.test_scaling import D, E, Editing
from tests.core.world import POLICY, A, B, C, upstream

CALLED = (Hook(command=("true",)),)
#: Every step that there is, and no warm-up, which goes on while the daemon is away.
EVERYTHING = replace(
    POLICY,
    warm_up=WarmUpPolicy(duration=0),
    process=ProcessPolicy(start=("app",), deploy=("deploy",), roll_back=("back",)),
    sticky=StickyPolicy("session", drain=20, idle=4),
    notices=NoticePolicy(True, ("http://127.0.0.1:1/",)),
    hooks=HookPolicy(CALLED, CALLED, CALLED),
)
WARMING = replace(EVERYTHING, warm_up=POLICY.warm_up)
#: How a change can go: as it should, or with this step failing, or this wish about it at this step.
Course = tuple[StepName | None, Steer | None]
COURSES: list[Course] = [
    (None, None),
    (StepName.START, None),
    (StepName.UP, None),
    (StepName.BEFORE_DRAIN, None),
    (StepName.EMPTY, Steer.ABORT),
    (StepName.EXIT, Steer.ABORT),
    (StepName.KILL, None),
    (StepName.SETTLE, Steer.PAUSE),
]
Journal = list[tuple[float, Event]]
Ends = dict[str, Any]


@dataclass
class Clock:
    """The machine's: it goes on while the daemon is away."""

    at: float = 0.0

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return 1e9 + self.at

    def boot(self) -> str:
        return "boot"


class Life:
    """A daemon from its start: takes events, and keeps what is to be recorded of each before the next one."""

    def __init__(self, clock: Clock, saved: Saved) -> None:
        self._clock = clock
        self.peers, self.changes = dict(saved.peers), dict(saved.changes)
        numbers = (saved.revision, saved.next_change, saved.next_epoch)
        event = Restored(*numbers, saved.peers, saved.changes, away=clock.at - saved.now)
        self.state, _ = step(State(), event, clock.at)
        self._recorded = self.state
        self.jobs: list[RunStep] = []

    def find(self, living: State) -> None:
        """See nginx and nginx.conf, which are as the life that ended saw them last; nginx follows this one as it did
        that one."""
        if living.plane.boot:
            self.take(PlaneSeen(living.plane.boot, living.plane.revision))
        if living.plane.error:
            self.take(PlaneLost(living.plane.error))
        self.take(ConfigRead(tuple(group.upstream for group in living.groups.values())))
        if not living.plane.error and living.plane.revision >= living.revision:
            self.take(PlaneSeen(living.plane.boot, self.state.revision))

    def take(self, event: Event) -> None:
        if isinstance(event, StepDone | StepFailed):
            change = self.state.changes.get(event.change)
            if change is None or event.step >= len(change.steps):
                return  # no adapter reports a step that there is not
        try:
            self.state, outcome = step(self.state, event, self._clock.at)
        except Refused:
            return
        self.jobs += [effect for effect in outcome.effects if isinstance(effect, RunStep)]
        if delta := between(self._recorded, self.state, (), self._clock):
            self.peers |= {name: peer for name, peer in delta.peers.items() if peer}
            for name in [name for name, peer in delta.peers.items() if not peer]:
                self.peers.pop(name, None)
            self.changes |= delta.changes
        self._recorded = self.state

    def under_way(self) -> list[RunStep]:
        """What adapters do now."""
        steps = ((job, self.state.changes[job.change].steps[job.step]) for job in self.jobs)
        under_way = {job for job, each in steps if each.state is StepState.RUNNING}
        return sorted(under_way, key=lambda job: (job.change, job.step))

    async def stored(self) -> Saved:
        """What a store gives back of it."""
        state = self.state
        numbers = (state.revision, state.next_change, state.next_epoch)
        delta = Delta(self._clock.now(), self._clock.wall(), self._clock.boot(), *numbers, self.peers, self.changes)
        with tempfile.TemporaryDirectory() as directory:
            for work in (lambda store: store.save(delta), lambda store: store.load()):
                store = SqliteStore(f"sqlite:///{directory}/state.db")
                found = await work(store)
                await store.close()
            return found

    def ends(self, later: float = 0.0) -> Ends:
        """How everything stands, by what is recorded, with the times of changes as in a life that began earlier."""
        return {
            "peers": {name: asdict(peer) for name, peer in self.peers.items()},
            "changes": {number: _recorded(change, later) for number, change in self.changes.items()},
            "next": (self.state.next_change, self.state.next_epoch),
        }


def _recorded(change: Change, later: float) -> dict[str, Any]:
    """A change as people and later lives read it, with its times as if it had gone on `later` seconds earlier.

    The table that a step waits for has another number in each life.
    """
    fields = asdict(change)
    for each in (fields, *fields["steps"]):
        each.pop("revision", None)
        for name in {"created", "started", "ended", "quiet"} & each.keys():
            each[name] = None if each[name] is None else round(each[name] - later, 6)
    return fields


def lived(history: Journal, middle: int | None = None, away: float = 0.0) -> Ends:
    """The ends of a history; with a daemon that is killed before event `middle` and started `away` seconds later."""
    clock, later = Clock(history[0][0]), 0.0
    life = Life(clock, Saved(clock.at))
    for number, (at, event) in enumerate(history):
        if number == middle:
            killed, saved = life, asyncio.run(life.stored())
            clock.at += away
            later = 0.0 if any(change.status.ended for change in killed.changes.values()) else away
            life = Life(clock, saved)
            life.changes = {**killed.changes, **life.changes}  # the store has those that have ended, too
            life.find(killed.state)
            assert life.under_way() == killed.under_way(), "what was under way is begun again, and only that"
        clock.at = at if middle is None or number < middle else at + away
        life.take(_renumbered(event, life.state))
    return life.ends(later)


def _renumbered(event: Event, state: State) -> Event:
    """nginx serves what this life has published (an odd number), or something older."""
    if isinstance(event, PlaneSeen | PeerSeen):
        return replace(event, revision=state.revision if event.revision % 2 else 0)
    return event


def comparable(value: object, killed: float = 0.0, away: float = 0.0) -> object:
    """Ends without the numbers of tables, and with times as in a life that went on when this one was killed."""
    if isinstance(value, dict):
        return {str(key): comparable(each, killed, away) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(each, killed, away) for each in value]
    if isinstance(value, str):
        return re.sub(r"revision \d+", "revision N", value)
    if isinstance(value, float):
        return round(value - away if value >= killed + away else value, 6)
    return value


def same(history: Journal, middle: int, away: float = 0.0) -> None:
    """The ends are the same, whether the daemon is killed before that event or not."""
    whole, again = lived(history), lived(history, middle, away)
    killed = history[middle - 1][0]
    again["peers"] = comparable(again["peers"], killed, away)
    assert comparable(again) == comparable(whole)


@functools.cache
def journal(kind: ChangeKind, course: Course, warming: bool) -> Journal:
    """All that happens while two servers go through such a change, one after the other."""
    world = Editing(in_flight={A: 1}, requests={A: 5})
    world.configure(upstream(policy=WARMING if warming else EVERYTHING))
    for server in world.state.groups["app"].upstream.servers:
        world.probe(server.key, times=2)
    servers = (D, E) if kind is ChangeKind.SCALE_OUT else (A, B)
    number = world.take(ChangeWished(kind, "app", servers, workers=3 * (kind is ChangeKind.SCALE))).change
    assert number is not None
    world.acknowledge()
    at, wish = course
    paused = 0  # the beat of the wish
    for beat in range(1, 400):
        change = world.change(number)
        if change.status.ended:
            break
        jobs = [job for job in world.jobs if job.name is (StepName.EXIT if at is StepName.KILL else at)]
        for job in jobs if wish is None else ():
            world.jobs.remove(job)
            lasts = StepDone(number, job.step, "it is still there", gone=False)
            world.take(lasts if at is StepName.KILL else StepFailed(number, job.step, "no"))
        begun = any(each.name is at and each.state is StepState.RUNNING for each in change.steps)
        if wish and begun and change.status is ChangeStatus.RUNNING and not paused:
            world.take(SteerWished(number, wish))
            paused = beat
        if change.status is ChangeStatus.PAUSED and beat > paused + 30:
            world.take(SteerWished(number, Steer.RESUME))
        if beat == 12:
            world.in_flight.clear()
            world.requests[A] = 6
        world.live(0.5)
    assert world.change(number).status.ended
    newest = {PlaneSeen: 1, PeerSeen: 1}
    return [(at, replace(e, revision=1) if type(e) in newest else e) for at, e in world.journal]  # type: ignore[type-var]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(ChangeKind)), st.sampled_from(COURSES), st.sampled_from([0.0, 7.5]))
def test_a_change_of_any_kind_that_is_cut_anywhere_ends_as_it_would_have(
    data: st.DataObject, kind: ChangeKind, course: Course, away: float
) -> None:
    history = journal(kind, course, not away)
    same(history, data.draw(st.integers(1, len(history) - 1)), away)


@settings(max_examples=100, deadline=None)
@given(HISTORIES, st.integers(1, 61))
def test_whatever_happens_a_life_goes_on_from_what_is_recorded(
    waits: list[tuple[float, Event | Counted]], middle: int
) -> None:
    history: Journal = [(1000.0, ConfigRead((upstream(policy=_heard(WARMING)),)))]
    for wait, happened in waits:
        at = history[-1][0] + wait
        event = _ejections(happened, at) if isinstance(happened, dict) else happened
        if isinstance(event, ConfigRead):
            (read,) = event.upstreams
            if read.policy is SUSPECTING:
                continue
            event = ConfigRead((replace(read, policy=_heard(read.policy)),))
        history.append((at, event))
    same(history, min(middle, len(history) - 1) or 1)


def _heard(policy: Policy) -> Policy:
    """The policy with an agent, and commands for every kind of change."""
    return replace(policy, process=EVERYTHING.process, health=replace(policy.health, agent=True))


def _ejections(counted: Counted, at: float) -> TrafficSeen:
    """nginx's counters, which count nothing but tell of ejections."""
    return TrafficSeen(
        "app",
        "boot",
        {
            key: Traffic(ejected=Ejection(at + 9, reason, 1)) if reason else Traffic()
            for key, (*_, reason) in counted.items()
        },
    )


def test_a_server_that_left_nginx_conf_while_no_daemon_ran_is_forgotten() -> None:
    drained = Peer(admin=Admin.DRAIN)
    life = Life(Clock(1000.0), Saved(990.0, peers={("app", A): drained, ("app", C): drained, ("gone", A): drained}))
    life.take(ConfigRead((upstream(2),)))
    assert {name: peer.admin for name, peer in life.peers.items()} == {("app", A): "drain", ("app", B): "ready"}
