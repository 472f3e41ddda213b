"""A world for the pure core: a manual clock, an nginx and processes that answer as told. No I/O, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from controller.core import table
from controller.core.events import (
    AdminWished,
    ChangeWished,
    ConfigRead,
    Event,
    Note,
    Outcome,
    PeerSeen,
    PlaneSeen,
    ProbeResult,
    RunStep,
    StepDone,
    Ticked,
)
from controller.core.model import Admin, Change, ChangeKind, Master, Peer, Server, State, StepName, Upstream
from controller.core.policy import DrainPolicy, HealthPolicy, Policy, ProcessPolicy, RolloutPolicy, WarmUpPolicy
from controller.core.step import step

POLICY = Policy(
    HealthPolicy(rise=2, fall=3),
    WarmUpPolicy(duration=10.0, curve=1.0, floor=0.1, starts="healthy"),
    DrainPolicy(timeout=30.0, on_timeout="abort", settle=3.0),
    RolloutPolicy(ready_time=1.0, up_timeout=20.0, max_load=0.0),
    ProcessPolicy(start=("app", "{port}")),
)


def server(port: int, **parts: object) -> Server:
    key = f"127.0.0.1:{port}"
    return replace(Server(key, key, "127.0.0.1", port), **parts)  # type: ignore[arg-type]


def upstream(count: int = 3, name: str = "app", policy: Policy = POLICY) -> Upstream:
    return Upstream(name, tuple(server(8001 + at) for at in range(count)), policy=policy)


@dataclass
class World:
    """Feeds events to the core and answers its effects. `journal` holds every (now, event) that was taken."""

    state: State = field(default_factory=State)
    now: float = 1000.0
    in_flight: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    nginx: bool = True
    jobs: list[RunStep] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    journal: list[tuple[float, Event]] = field(default_factory=list)
    beats: int = 0
    healthy: Callable[[str], bool] = lambda key: True

    def take(self, event: Event) -> Outcome:
        self.state, outcome = step(self.state, event, self.now)
        self.journal.append((self.now, event))
        self.jobs += [e for e in outcome.effects if isinstance(e, RunStep)]
        self.notes += [e for e in outcome.effects if isinstance(e, Note)]
        return outcome

    def configure(self, *upstreams: Upstream) -> World:
        self.take(ConfigRead(upstreams or (upstream(),)))
        return self.acknowledge()

    def acknowledge(self) -> World:
        """nginx takes the newest table and its counters are read, until nothing moves any more."""
        while self.nginx:
            before = self.state
            if self.state.plane.error or self.state.plane.revision < self.state.revision:
                self.take(PlaneSeen("boot", self.state.revision))
            for name, group in self.state.groups.items():
                for key, peer in group.peers.items():
                    if peer.admin is Admin.DRAIN or peer.held:
                        in_flight = self.in_flight.get(f"{name} {key}", self.in_flight.get(key, 0))
                        requests = self.requests.get(key, 0)
                        self.take(PeerSeen(name, key, self.state.plane.revision, in_flight, requests=requests))
            if self.state is before:
                break
        return self

    def probe(self, key: str, ok: bool = True, times: int = 1, reason: str = "refused") -> World:
        for _ in range(times):
            self.take(ProbeResult("app", key, ok, "ok" if ok else reason))
        return self.acknowledge()

    def wish(self, kind: ChangeKind, *keys: str, batch: int = 0, forced: bool = False) -> int:
        outcome = self.take(ChangeWished(kind, "app", keys, batch, forced))
        self.acknowledge()
        assert outcome.change is not None
        return outcome.change

    def admin(self, key: str, admin: Admin, forced: bool = False) -> World:
        self.take(AdminWished("app", key, admin, forced))
        return self.acknowledge()

    def answer(self) -> World:
        """Every job that waits succeeds, as a healthy process would have it."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            port = int(job.server.rsplit(":", 1)[1])
            master = None
            if job.name in (StepName.FIND, StepName.START):
                master = Master(port, self.now, "/usr/bin/python3", ((port + 1, self.now),))
            self.take(StepDone(job.change, job.step, job.name.value, master))
        return self.acknowledge()

    def pass_time(self, seconds: float) -> World:
        self.now += seconds
        self.take(Ticked())
        return self.acknowledge()

    def live(self, seconds: float) -> World:
        """Let time pass in half seconds, with probes every second and processes that answer."""
        for _ in range(int(seconds * 2)):
            self.pass_time(0.5)
            self.answer()
            self.beats += 1
            if self.beats % 2:
                for name, group in self.state.groups.items():
                    for key in group.peers:
                        ok = self.healthy(key)
                        self.take(ProbeResult(name, key, ok, "ok" if ok else "refused"))
                self.acknowledge()
        return self

    def peer(self, key: str) -> Peer:
        return self.state.groups["app"].peers[key]

    def change(self, number: int) -> Change:
        return self.state.changes[number]

    def entry(self, key: str) -> dict[str, object]:
        upstreams = table.table(self.state, self.now)["upstreams"]
        assert isinstance(upstreams, dict)
        return next(s for s in upstreams["app"]["servers"] if s["key"] == key)

    def serving(self) -> tuple[str, ...]:
        return table.serving(self.state.groups["app"])


A, B, C = "127.0.0.1:8001", "127.0.0.1:8002", "127.0.0.1:8003"
