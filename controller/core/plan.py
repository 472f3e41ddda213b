"""What an operation will do to the capacity, before it is done: the core itself under a virtual clock.

The operation is wished of a copy of the state. Whatever the world would answer is answered here at once or after the
seconds that are known of it: nginx takes every table, drained servers empty, processes end and start, probes pass.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from controller.core import change, guards, table, warmup
from controller.core.events import (
    ChangeWished,
    Event,
    PeerSeen,
    PlaneSeen,
    ProbeNow,
    ProbeResult,
    RunStep,
    StepDone,
    Ticked,
)
from controller.core.model import (
    Change,
    ChangeKind,
    ChangeStatus,
    Foreseen,
    Group,
    Master,
    Peer,
    Plane,
    Refused,
    State,
    Step,
    StepName,
    StepState,
    Warmth,
)
from controller.core.policy import Policy
from controller.core.step import step
from controller.core.steps import STEPS

USUAL: Mapping[StepName, float] = {StepName.EXIT: 1.0, StepName.START: 2.0, StepName.UP: 2.0}
"""Seconds that a step takes where nothing is known of it; those that are not here take none."""

#: Steps whose seconds follow from the policy and the simulation, not from what was measured.
_RECKONED = frozenset({StepName.DRAIN, StepName.SESSIONS, StepName.SETTLE, StepName.WARM, StepName.HOLD})
_NEWEST = 2**62  # a reading of whatever table
_LONGEST = 30 * 86400.0  # virtual seconds after which an operation counts as one that never ends
_MOST = 100_000  # samples after which it does, too
_TOLERANCE = guards.TOLERANCE
_SIMULATED = 8  # batches at most,
_SERVERS = 64  # and about so many servers; the heaviest batches are among them


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known: `rate` requests a second come to the upstream, one server of weight 1 can take `capacity` of them
    (None: not known), and a step takes so many `seconds`."""

    rate: float | None = None
    capacity: float | None = None
    seconds: Mapping[StepName, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """The upstream `at` seconds after the beginning, until the next sample.

    `capacity` is the part of its whole weight that serves, with ramps as far as they are; `load` the highest multiple
    of its usual share that a `server` gets; `cold` the part of the requests that goes to servers that warm up;
    `serving` the number of servers that get any.
    """

    at: float
    capacity: float
    load: float
    server: str
    cold: float
    serving: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Servers that go at once, between two times; `capacity` is the lowest then, `load` the highest, at `server`."""

    servers: tuple[str, ...]
    begins: float
    ends: float
    capacity: float
    load: float
    server: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen. Times are seconds since the beginning; `error` says why the operation would fail.

    Of many batches only the heaviest are simulated, and stand in `batches` and `samples`; the `duration` is reckoned
    for all of them, `count`.
    `loads` are the highest multiples of its usual share that each server gets: of what it gets when all servers of
    nginx.conf that are not `down` serve and are warm. A backup has none; it is measured by a primary of its weight.
    `weight` is theirs in all.
    """

    kind: ChangeKind
    upstream: str
    batch: int
    count: int
    duration: float
    batches: tuple[Batch, ...]
    samples: tuple[Sample, ...]
    loads: Mapping[str, float]
    weight: int
    error: str = ""

    @property
    def load(self) -> float:
        """The highest multiple of its usual share that any server gets."""
        return max(self.loads.values(), default=0.0)

    @property
    def server(self) -> str:
        """The server that gets it."""
        return max(self.loads, key=lambda key: self.loads[key], default="")

    @property
    def capacity(self) -> float:
        """The least part of the upstream's weight that serves."""
        return min(each.capacity for each in self.samples)

    @property
    def serving(self) -> int:
        """The least number of servers that serve."""
        return min(each.serving for each in self.samples)

    @property
    def cold(self) -> float:
        """The largest part of the requests that goes to servers that warm up."""
        return max(each.cold for each in self.samples)

    @property
    def spacing(self) -> float:
        """Seconds from the beginning of one batch to that of the next."""
        return self.duration / self.count

    def lasts(self, load: float) -> float:
        """Seconds during which some server gets more than this multiple of its usual share."""
        pairs = itertools.pairwise(self.samples)
        return sum(after.at - each.at for each, after in pairs if each.load > load + _TOLERANCE)

    def outage(self) -> float:
        """Seconds during which no server serves."""
        return sum(after.at - each.at for each, after in itertools.pairwise(self.samples) if not each.server)


@dataclass(frozen=True, slots=True)
class Advice:
    """The largest batch that is safe, and its plan; not `safe` where even one server at once is too much."""

    plan: Plan
    safe: bool


def simulate(state: State, wish: ChangeWished, observed: Observed, now: float) -> Plan:
    """What this wish would do if it were granted `now`; Refused as the wish itself, and for a scale-out."""
    if wish.kind is ChangeKind.SCALE_OUT:
        message = f"a scale-out takes nothing away from {wish.upstream}: there is nothing to plan"
        raise Refused("invalid", message, "scale out")
    state = _open(state, wish)
    weights, batches = _batches(state, wish, now)
    most = max(1, min(_SIMULATED, _SERVERS // len(batches[0])))
    if len(batches) <= most:
        return _World(state, wish, observed, now).run()
    heaviest = sorted(batches, key=lambda batch: -sum(weights[key] for key in batch))[:most]
    some = replace(wish, servers=tuple(key for batch in batches if batch in heaviest for key in batch))
    plan = _World(state, some, observed, now).run()
    return replace(plan, count=len(batches), duration=plan.duration * len(batches) / len(plan.batches))


def advise(state: State, wish: ChangeWished, observed: Observed, now: float) -> Advice:
    """The largest batch in which no server gets more than `rollout.max_load` times its usual share (twice where there
    is no limit), nor more than it can take; Refused as the wish itself."""
    policy = change.group_of(state, wish.upstream).upstream.policy
    limit = policy.rollout.max_load or 2.0
    best = simulate(state, replace(wish, batch=1), observed, now)
    low, high = 1, best.count
    if not _fits(best, limit, observed):
        return Advice(best, safe=False)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            tried = simulate(state, replace(wish, batch=middle), observed, now)
        except Refused:  # it would leave no server
            high = middle - 1
            continue
        if _fits(tried, limit, observed):
            low, best = middle, tried
        else:
            high = middle - 1
    return Advice(best, safe=True)


def foretell(state: State, wish: ChangeWished, observed: Observed, now: float) -> Foreseen:
    """What is kept of the plan of this wish, to be held against what happens; Refused as the wish itself."""
    made = simulate(state, wish, observed, now)
    before = len(table.serving(guards.freed(state, wish.upstream).groups[wish.upstream]))
    return Foreseen(made.duration, made.capacity, made.serving, before, made.load, made.server, observed.rate)


def surge(plan: Plan) -> str:
    """How much more than usual a server gets, as a sentence."""
    if not plan.server:
        return f"no server of {plan.upstream} serves"
    if plan.load <= 1 + _TOLERANCE:
        return "no server gets more than its usual share"
    nearly = plan.lasts(1 + (plan.load - 1) * 0.9) * plan.count / len(plan.batches)
    return (
        f"the surge: {plan.server} gets up to {plan.load:.2f} times its usual share; for {nearly:.1f} s in all "
        "a server gets nearly as much"
    )


def warnings(plan: Plan, policy: Policy, observed: Observed) -> tuple[str, ...]:
    """What an operator should know before, in sentences; none where nothing is wrong."""
    said: list[str] = []
    limit = policy.rollout.max_load
    if plan.error:
        said.append(f"it would fail: {plan.error}")
    if outage := plan.outage():
        said.append(f"no server of {plan.upstream} serves for {outage:.1f} s: every request then fails")
    if limit and plan.load > limit + _TOLERANCE:
        said.append(
            f"{plan.server} gets {plan.load:.2f} times its usual share; max_load allows {limit:g} times, "
            "and what goes in batches is refused beyond it"
        )
    if observed.rate and observed.capacity and (used := _used(plan, observed)) > 1 + _TOLERANCE:
        said.append(
            f"overload: a server is asked for {used * 100:.0f} % of what it can take, at {observed.rate:.0f} requests/s"
        )
    if policy.warm_up.duration <= 0 and StepName.UP in STEPS[plan.kind] and len(plan.loads) > 1:
        said.append(f"{plan.upstream} has no warm-up: a server that comes back gets its full share while it is cold")
    elif plan.cold > policy.warm_up.max_cold + _TOLERANCE:
        said.append(f"up to {plan.cold * 100:.0f} % of the requests go to servers that still warm up")
    return tuple(said)


def learned(steps: Iterable[tuple[str, float]]) -> dict[StepName, float]:
    """The median of what each step took, from (name, seconds) of earlier operations; steps that follow from the policy
    are left out."""
    taken: dict[StepName, list[float]] = {}
    for name, seconds in steps:
        if StepName(name) not in _RECKONED:
            taken.setdefault(StepName(name), []).append(seconds)
    return {name: statistics.median(each) for name, each in taken.items()}


def awaited(state: State, wish: ChangeWished) -> tuple[str, ...]:
    """What a plan of this wish supposes to have ended, in sentences."""
    if wish.kind is ChangeKind.DRAIN:
        return ()
    return tuple(
        f"change {each.id} ({each.kind}) of {each.upstream} comes first: this is planned for when it has ended well"
        for each in guards.ahead(state, wish.upstream)
    )


def _open(state: State, wish: ChangeWished) -> State:
    """The state in which a wish is tried: nothing is in its way, and no limit of load refuses it."""
    if wish.kind is not ChangeKind.DRAIN:
        state = guards.freed(state, wish.upstream)
    group = change.group_of(state, wish.upstream)
    policy = group.upstream.policy
    unlimited = replace(policy, rollout=replace(policy.rollout, max_load=0.0, capacity=0.0))
    group = replace(group, upstream=replace(group.upstream, policy=unlimited))
    return replace(state, groups={**state.groups, wish.upstream: group})


def _batches(state: State, wish: ChangeWished, now: float) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """The weights of all servers, and which of them go at once, in order; Refused as the wish itself."""
    begun, outcome = change.begin(state, wish, now)
    assert outcome.change is not None, "a granted change has an id"
    servers = begun.groups[wish.upstream].upstream.servers
    return {s.key: s.weight for s in servers}, guards.batches(begun.changes[outcome.change])


def _used(plan: Plan, observed: Observed) -> float:
    """The highest part of what it can take that a server is asked for."""
    if not observed.rate or not observed.capacity:
        return 0.0
    return observed.rate * plan.load / plan.weight / observed.capacity


def _fits(plan: Plan, limit: float, observed: Observed) -> bool:
    return (
        not plan.error
        and not plan.outage()
        and plan.load <= limit + _TOLERANCE
        and _used(plan, observed) <= 1 + _TOLERANCE
    )


class _World:
    """The upstream, its nginx, its processes and its clock. `due` are answers that come at a time."""

    def __init__(self, state: State, wish: ChangeWished, observed: Observed, now: float) -> None:
        group = change.group_of(state, wish.upstream)
        self._wish = wish
        self._policy = group.upstream.policy
        self._observed = observed
        self._began = self._now = now
        self._state = replace(
            state,
            groups={wish.upstream: replace(group, compared=None, weighed={}, measured=None)},
            changes={each.id: each for each in change.running(state) if each.upstream == wish.upstream},
            plane=Plane("plan", state.revision, ""),
            stored={},
            heartbeats={},
        )
        self._due: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._asked: set[tuple[int, int]] = set()  # steps and warm-ups that have their answer on the way
        self._usual = guards.usual(group)
        self._samples: list[Sample] = []
        self._loads: dict[str, float] = {}

    def run(self) -> Plan:
        """Let it happen."""
        number = self._take(self._wish)
        assert number is not None, "a granted change has an id"
        while self._change(number).status is ChangeStatus.RUNNING and not self._endless():
            at = max(self._next(), self._now + _TOLERANCE)
            self._measure()
            if self._ramps():
                self._now = (self._now + at) / 2
                self._measure()
                self._now = max(self._now, at - _TOLERANCE)
                self._measure()
            self._now = at
            while self._due and self._due[0][0] <= at:
                self._take(heapq.heappop(self._due)[2])
            self._take(Ticked())
        self._measure()
        return self._plan(self._change(number))

    def _endless(self) -> bool:
        return self._now - self._began > _LONGEST or len(self._samples) > _MOST

    def _change(self, number: int) -> Change:
        return self._state.changes[number]

    @property
    def _group(self) -> Group:
        return self._state.groups[self._wish.upstream]

    def _take(self, event: Event) -> int | None:
        """Tell the core what happened, and let nginx and the world answer."""
        self._state, outcome = step(self._state, event, self._now)
        for effect in outcome.effects:
            if isinstance(effect, RunStep):
                self._later(self._takes(effect.name), StepDone(effect.change, effect.step, "", Master(1, 0.0, "")))
            elif isinstance(effect, ProbeNow):
                passed = ProbeResult(effect.upstream, effect.server, True, "ok")
                for _ in range(self._policy.health.rise):
                    self._later(self._takes(StepName.UP), passed)
        if self._state.plane.revision < self._state.revision:
            self._take(PlaneSeen("plan", self._state.revision))
        self._requests()
        return outcome.change

    def _later(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._due, (self._now + seconds, next(self._order), event))

    def _takes(self, name: StepName) -> float:
        return self._observed.seconds.get(name, USUAL.get(name, 0.0))

    def _requests(self) -> None:
        """What the traffic does: the last request at a drained server ends, the first one at a new server comes."""
        for each, at, running in self._running():
            if running.name is StepName.EMPTY and (each.id, at) not in self._asked:
                self._asked.add((each.id, at))
                left = min(self._takes(StepName.EMPTY), self._policy.drain.timeout)
                self._later(left, PeerSeen(each.upstream, running.server, _NEWEST, 0))
        for server in self._group.upstream.servers:
            warm = self._group.peers[server.key].warm_up
            if warm.phase is Warmth.WAITING and (-1, warm.epoch) not in self._asked:
                self._asked.add((-1, warm.epoch))
                rate = (self._observed.rate or 0.0) * self._shares().get(server.key, 0.0)
                first = PeerSeen(self._wish.upstream, server.key, _NEWEST, 0, warm.epoch, 0.0, True)
                wait = 1 / rate if rate else 0.0
                # Nobody waits longer than the ramp lasts. What is foreseen is then how it goes if requests do come: a
                # ramp that never began would make the others' shares, of next to nothing, too large for any batch.
                self._later(wait if wait <= self._policy.warm_up.duration else 0.0, first)

    def _running(self) -> Iterator[tuple[Change, int, Step]]:
        for each in change.running(self._state):
            for at, running in enumerate(each.steps):
                if running.state is StepState.RUNNING:
                    yield each, at, running

    def _next(self) -> float:
        """When something happens next; at the latest after a part of a warm-up, for what only the core knows."""
        policy, times = self._policy, [self._now + max(1.0, self._policy.warm_up.duration / 16)]
        if self._due:
            times.append(self._due[0][0])
        for each, _, running in self._running():
            if running.name is StepName.SETTLE:
                drained = next(s for s in each.steps if s.server == running.server and s.name is StepName.DRAIN)
                times.append((drained.ended or self._now) + policy.drain.settle)
            elif running.name is StepName.HOLD:
                times.append((running.started or self._now) + policy.rollout.ready_time)
        for peer in self._group.peers.values():
            if peer.warm_up.phase is Warmth.RUNNING:
                times.append(self._now + policy.warm_up.duration - warmup.elapsed(peer.warm_up, self._now))
            times += [entry.until for entry in peer.quarantine]
        return min(times)

    def _ramps(self) -> bool:
        return any(warmup.ramping(peer.warm_up) for peer in self._group.peers.values())

    def _shares(self) -> dict[str, float]:
        """The part of the requests that each server gets now; backups have none while a primary serves."""
        group = self._group
        weights = table.effective_weights(group, self._now)
        tiers = (
            {s.key: weights[s.key] for s in group.upstream.servers if s.backup is backup} for backup in (False, True)
        )
        for tier in tiers:
            if total := sum(tier.values()):
                return {key: weight / total for key, weight in tier.items() if weight}
        return {}

    def _measure(self) -> None:
        group, shares = self._group, self._shares()
        loads = {key: share / self._usual[key] for key, share in shares.items()}
        for key, load in loads.items():
            self._loads[key] = max(load, self._loads.get(key, 0.0))
        busiest = max(loads, key=lambda key: loads[key], default="")
        ramps = [key for key in shares if warmup.ramping(group.peers[key].warm_up)]
        capacity = sum(self._usual[key] * self._warm(group.peers[key]) for key in shares)
        cold = sum(shares[key] for key in ramps)
        most = loads.get(busiest, 0.0)
        self._samples.append(Sample(self._now - self._began, capacity, most, busiest, cold, len(shares)))

    def _warm(self, peer: Peer) -> float:
        return warmup.share(self._policy.warm_up, peer.warm_up, self._now)

    def _plan(self, ended: Change) -> Plan:
        error, batches = ended.error, self._batches(ended)
        if ended.status is ChangeStatus.RUNNING:
            error = "no end of it can be seen"
        return Plan(
            kind=ended.kind,
            upstream=ended.upstream,
            batch=max(len(each.servers) for each in batches),
            count=len(batches),
            duration=(self._now if ended.ended is None else ended.ended) - self._began,
            batches=batches,
            samples=tuple(self._samples),
            loads=self._loads,
            weight=guards.weight(self._group),
            error=error,
        )

    def _batches(self, ended: Change) -> tuple[Batch, ...]:
        found = []
        for _, each in itertools.groupby(ended.steps, key=lambda each: each.batch):
            steps = list(each)
            times = [(s.started, s.ended) for s in steps if s.started is not None and s.ended is not None]
            if not times:  # it failed before
                continue
            begins, ends = (min(b for b, _ in times) - self._began, max(e for _, e in times) - self._began)
            within = [s for s in self._samples if begins <= s.at < ends] or self._samples[-1:]
            worst = max(within, key=lambda s: s.load)
            servers = tuple(dict.fromkeys(s.server for s in steps))
            least = min(s.capacity for s in within)
            found.append(Batch(servers, begins, ends, least, worst.load, worst.server))
        return tuple(found)
