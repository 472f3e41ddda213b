"""What the runtime needs of the world, as protocols; adapters fulfil them, tests may fulfil them with fakes.

Values that cross this border and their exceptions stand here; how they are obtained stands in controller/adapters.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from controller.core.events import Note
from controller.core.model import Change, Foreseen, Master, Peer, Server, Upstream
from controller.core.outcome import Happened
from controller.core.policy import ProcessPolicy
from controller.errors import HeadgateError


class Clock(Protocol):
    """Two clocks: one to reckon with, one to show to people."""

    def now(self) -> float:
        """Seconds of the monotonic clock."""

    def wall(self) -> float:
        """Seconds since the epoch, for display only."""

    def boot(self) -> str:
        """An id that changes when the machine reboots, that is, when `now` starts afresh."""


# --- data plane -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlaneStatus:
    """What nginx said of itself: `boot` changes at a restart, `revision` is the table it serves (0: none)."""

    boot: str
    revision: int
    workers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerEjected:
    """nginx keeps a server away by itself, for so many seconds more."""

    reason: str
    remaining: float
    times: int


@dataclass(frozen=True, slots=True)
class PeerCounters:
    """A server's counters over all workers.

    `requests`, `answered`, `errors` (5xx answers), `failures` (no answer) and, of those, `timeouts` count tries since
    nginx started; `seconds` is the sum of the response times of those that were answered. `warm_picked`: nginx has
    picked the server in the warm-up `warm_epoch`.
    """

    in_flight: int
    requests: int
    failures: int
    warm_epoch: int | None = None
    warm_elapsed: float = 0.0
    warm_started: bool = False
    warm_picked: bool = False
    answered: int = 0
    errors: int = 0
    timeouts: int = 0
    seconds: float = 0.0
    ejected: PeerEjected | None = None
    refused_marks: int = 0


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters by upstream and server key, read while nginx served `revision`.

    `native` counts, by upstream, requests in flight whose server nginx does not know: it balanced them by itself,
    or former workers of it, each counted as one, have them.
    """

    boot: str
    revision: int
    upstreams: Mapping[str, Mapping[str, PeerCounters]] = field(default_factory=dict)
    native: Mapping[str, int] = field(default_factory=dict)


class PlaneUnreachable(HeadgateError):
    """nginx's control socket does not answer."""


class PlaneRefused(HeadgateError):
    """nginx refused a table. `revision` is what it serves, where it said so."""

    def __init__(self, code: str, message: str, remedy: str, revision: int | None = None) -> None:
        super().__init__(message, remedy)
        self.code = code
        self.revision = revision


Parameter = tuple[str, str, int, str]
"""Of a `server` line: (upstream, address as written, its number among equal ones there, parameter)."""


class DataPlane(Protocol):
    """Where tables go and counters come from."""

    async def status(self) -> PlaneStatus:
        """Ask nginx for its boot id and revision; PlaneUnreachable."""

    async def publish(self, table: Mapping[str, object]) -> PlaneStatus:
        """Hand over a whole table and return when every new pick follows it; PlaneUnreachable, PlaneRefused."""

    async def counters(self, upstream: str | None = None) -> Counters:
        """Read the counters, of one upstream or of all; PlaneUnreachable."""

    async def remembered(self) -> Mapping[str, Any] | None:
        """The table that was handed over last, in this life or an earlier one, None where that is not known."""

    async def mean(self, meant: Mapping[Parameter, str | None]) -> None:
        """The author wants these values where a plane has written its own (None: no such parameter); PlaneRefused."""

    async def load(self) -> None:
        """Return when nginx balances by the `server` lines as they stand; PlaneUnreachable, PlaneRefused."""

    async def close(self) -> None:
        """Let go of connections."""


# --- processes --------------------------------------------------------------------------------------------------


class ProcessError(HeadgateError):
    """A process could not be found, verified, signalled or started."""


class HookError(HeadgateError):
    """A hook that must not fail has failed; nothing secret stands in the message."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a new master must stand before the old one goes: `check` passed `rise` times in a row within `limit` s."""

    check: Check
    rise: int
    limit: float


class ProcessControl(Protocol):
    """One server's process. Every call may be repeated after a crash of the daemon."""

    async def find(self, upstream: str, server: Server, policy: ProcessPolicy) -> Master | None:
        """The verified master that serves this server, None where none runs; ProcessError: found, but not trusted."""

    async def terminate(self, master: Master, policy: ProcessPolicy) -> None:
        """Ask it to finish what it has and end (TERM, or the unit's stop). A master that is gone already is fine."""

    async def unreplaced(self, upstream: str, server: Server, master: Master, policy: ProcessPolicy) -> None:
        """Return when it lives, or nothing serves in its place; ProcessError, naming what does."""

    async def wait_exit(self, master: Master, timeout: float) -> bool:
        """Whether master and workers were gone within `timeout` seconds."""

    async def kill(self, master: Master, policy: ProcessPolicy) -> tuple[int, ...]:
        """KILL what is left of master and workers, each verified; the pids that were killed."""

    async def start(self, upstream: str, server: Server, policy: ProcessPolicy, mark: str) -> Master:
        """Start it, unless it runs, and return its master once it listens; ProcessError with what it printed.

        What a daemon that died began with this mark is waited for, or ended first.
        """

    async def ended(self, master: Master, timeout: float) -> bool:
        """Whether the master itself ended within `timeout` seconds."""

    async def reload(self, master: Master) -> Master:
        """Have it make new workers (HUP); the master with the workers that it had. ProcessError where it has ended."""

    async def renewed(self, master: Master, policy: ProcessPolicy) -> Master:
        """Wait until other workers than these accept requests and these have ended; ProcessError."""

    async def upgrade(self, server: Server, master: Master, policy: ProcessPolicy, trial: Trial) -> Master:
        """Have it make a new master beside itself (USR2); that one once it has passed its trial. ProcessError: it is
        ended again."""

    async def scale(self, master: Master, workers: int, policy: ProcessPolicy) -> Master:
        """Bring it to so many workers (TTIN, TTOU), and wait until they accept requests; ProcessError."""

    async def run(
        self, command: Sequence[str], upstream: str, server: Server, policy: ProcessPolicy, mark: str
    ) -> None:
        """Run a configured command to its end; ProcessError. What a daemon that died left of it is ended first."""


# --- the host ---------------------------------------------------------------------------------------------------


class Edge(Protocol):
    """This edge host as a whole."""

    async def offline(self) -> bool:
        """Whether it was taken offline, in whichever life; StoreError."""

    async def set_offline(self, offline: bool) -> None:
        """Remember it for this life and later ones; StoreError."""

    async def clients(self) -> int:
        """Connections that clients hold to nginx over TCP; PlaneUnreachable where they cannot be counted."""


# --- probes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """What a probe does. `type` is http, https, tcp, grpc, grpcs or agent; seconds; `statuses` are inclusive ranges;
    `body` a substring; `header` is a name, or a name, a colon and a substring of its value.

    `jitter` is the share of the interval by which each wait varies either way. `fast_interval` and `down_interval`
    replace `interval` while the verdict is about to change, and while the server is down. `service` belongs to grpc
    and grpcs, `send` to agent. `agent` is a second check beside this one, which asks the server's agent.
    """

    type: str = "http"
    path: str = "/healthz"
    host: str | None = None
    port: int | None = None
    interval: float = 2.0
    fast_interval: float | None = None
    down_interval: float | None = None
    timeout: float = 1.0
    jitter: float = 0.1
    statuses: tuple[tuple[int, int], ...] = ((200, 399),)
    body: str | None = None
    header: str | None = None
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    server_name: str | None = None
    verify: bool = True
    service: str = ""
    send: str = ""
    agent: Check | None = None


class Pace(enum.Enum):
    """How soon the next probe of a server comes: by `interval`, `fast_interval` or `down_interval` of its check."""

    STEADY = "steady"
    FAST = "fast"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Target:
    """A server, how it is probed, and how often now."""

    server: Server
    check: Check
    pace: Pace = Pace.STEADY


class Prober(Protocol):
    """Keeps probing a set of targets and emits ProbeResult events, and AgentSaid for what agents answer."""

    def set_targets(self, targets: Mapping[tuple[str, str], Target]) -> None:
        """Probe exactly these, by (upstream, server key). Unchanged ones keep their rhythm; new ones start at once.

        Another pace shortens the wait for the next probe at once, and never cancels one that is under way.
        """

    def probe_now(self, upstream: str, server: str) -> None:
        """Drop a probe under way, if any, and probe this target at once."""

    async def close(self) -> None:
        """Cancel everything and wait for it."""


# --- configuration ----------------------------------------------------------------------------------------------


class ConfigError(HeadgateError):
    """nginx.conf could not be read; the message names file and line."""


@dataclass(frozen=True, slots=True)
class NginxConfig:
    """What was read: the hooked upstreams with policies, and the names of those that have no hook."""

    upstreams: tuple[Upstream, ...]
    unhooked: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class ConfigSource(Protocol):
    """nginx's own configuration."""

    def remember(self, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Last addresses of host names from an earlier life, by the address of their `server` line as written."""

    async def read(self) -> NginxConfig:
        """Parse the files in a thread and resolve host names (one that fails keeps its last addresses); ConfigError."""

    async def resolve_again(self) -> NginxConfig | None:
        """The configuration as last read with host names resolved anew; None where nothing differs."""


class Members(Protocol):
    """The `server` lines in nginx's own files. Each edit may be repeated: what is so already is done."""

    async def check(self, upstream: str, adding: Sequence[str], removing: Sequence[str], weight: int) -> None:
        """See that these could be added and removed; ConfigError with the remedy. Writes nothing."""

    async def add(self, upstream: str, address: str, weight: int) -> str:
        """Add a line, and say what was done; ConfigError and what a writer of files raises."""

    async def remove(self, upstream: str, address: str) -> str:
        """Take out the lines of this address, and say what was done; as `add`."""


# --- store ------------------------------------------------------------------------------------------------------


class StoreError(HeadgateError):
    """The store cannot be read or written (full disk, permissions, corruption)."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What an earlier life left: durable peers, all unfinished changes, counters. `now` and `boot` date it.

    `lost` says what became of a store that could not be read; empty where all is well.
    """

    now: float = 0.0
    boot: str = ""
    revision: int = 0
    next_change: int = 1
    next_epoch: int = 1
    peers: Mapping[tuple[str, str], Peer] = field(default_factory=dict)
    changes: Mapping[int, Change] = field(default_factory=dict)
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """One transaction: what has changed since the last one. A peer of None has been forgotten."""

    now: float
    wall: float
    boot: str
    revision: int
    next_change: int
    next_epoch: int
    peers: Mapping[tuple[str, str], Peer | None] = field(default_factory=dict)
    changes: Mapping[int, Change] = field(default_factory=dict)
    notes: Sequence[Note] = ()


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A note as recorded; `id` grows, `at` is seconds since the epoch."""

    id: int
    at: float
    kind: str
    text: str
    upstream: str = ""
    server: str = ""
    change: int | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step with times for people (seconds since the epoch)."""

    name: str
    server: str
    batch: int
    state: str
    started_at: float | None
    ended_at: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """A change with times for people (seconds since the epoch); what was planned, and, after its end, what it did.

    `batch`, `max_unavailable` and `workers` are those of `core.model.Change`: None where there is no limit, nothing to
    scale, or, of a change of an earlier version, nothing recorded.
    """

    id: int
    kind: str
    upstream: str
    status: str
    forced: bool
    created_at: float
    ended_at: float | None
    error: str
    steps: tuple[StepRecord, ...] = ()
    plan: Foreseen | None = None
    outcome: Happened | None = None
    batch: int | None = None
    max_unavailable: int | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class TrafficRecord:
    """What a server got in one second, or in a longer step, from `at` (seconds since the epoch) on.

    Tries begun, answers, 5xx answers and tries without an answer, in fractions where a reading was spread over several
    seconds; the sum of the response times in seconds; and the most requests that were seen in flight.
    """

    upstream: str
    server: str
    at: int
    requests: float
    answered: float
    errors: float
    failures: float
    seconds: float
    in_flight: int


class Store(Protocol):
    """Durable memory: SQLite on one host. One writer; every save is one transaction."""

    async def load(self) -> Saved:
        """What is there; StoreError."""

    async def save(self, delta: Delta) -> tuple[EventRecord, ...]:
        """Write one transaction and return the notes as recorded; StoreError, and then nothing of it is written."""

    async def changes(self, limit: int = 50, before: int | None = None) -> tuple[ChangeRecord, ...]:
        """The newest changes first, without steps."""

    async def change(self, change: int) -> ChangeRecord | None:
        """One change with its steps."""

    async def unjudged(self) -> tuple[int, ...]:
        """The oldest changes that have ended and of which is planned, and not yet recorded, what they did."""

    async def save_outcome(self, change: int, happened: Happened) -> None:
        """Record what a change did; StoreError."""

    async def last_change(self, upstream: str, server: str) -> ChangeRecord | None:
        """The newest change in which this server has steps, with its steps."""

    async def events(self, after: int | None = None, limit: int = 200) -> tuple[EventRecord, ...]:
        """Events with id > `after` in order; without `after` the newest `limit`, in order."""

    async def events_between(self, upstream: str, since: float, until: float, limit: int) -> tuple[EventRecord, ...]:
        """The newest `limit` events of an upstream within a time (seconds since the epoch, `until` excluded), in
        order; without the single steps of changes."""

    async def events_of(self, upstream: str, server: str, limit: int) -> tuple[EventRecord, ...]:
        """The newest `limit` events of this server, and of its upstream as a whole, in order."""

    async def save_traffic(self, rows: Sequence[TrafficRecord], wall: float) -> None:
        """Add these seconds, and forget what is too old by the clock of the wall; StoreError."""

    async def traffic(
        self, upstream: str, since: int, until: int, step: int, server: str | None = None
    ) -> tuple[TrafficRecord, ...]:
        """What the servers of an upstream (or one of them) got in steps of `step` seconds, counted from `since` to
        `until` (excluded); in order of server and time. A step without traffic is left out."""

    async def close(self) -> None:
        """Finish writing and close."""
