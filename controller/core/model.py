"""What Headgate knows: upstreams and servers as configured, peers as living things, changes as recorded steps.

Only frozen values and their small derived properties belong here; decisions stand in the modules beside this one.
All times are seconds of a monotonic clock, all durations are seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Refused(Exception):
    """A wish that a guard or the present state does not allow; nothing has changed.

    `code` is one of `not_found`, `busy`, `guard`, `invalid`; `remedy` says what the operator can do instead.
    """

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy


class Admin(enum.StrEnum):
    """What an operator or a change wants of a peer. A probe never changes it."""

    READY = "ready"
    DRAIN = "drain"
    MAINT = "maint"


class Health(enum.StrEnum):
    """What the probes found."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


class Warmth(enum.StrEnum):
    """Where a peer stands in its slow start."""

    NONE = "none"
    WAITING = "waiting"  # for the first request
    RUNNING = "running"
    DONE = "done"


class Routing(enum.StrEnum):
    """A peer's state in the routing table: four facts folded into the one that a balancer needs."""

    UP = "up"
    DOWN = "down"
    DRAIN = "drain"
    MAINT = "maint"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a directive stands."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Server:
    """One configured line of an upstream, or one address of a line that holds a host name.

    `address` is as written in nginx.conf; `key` names the peer: the address, and for a host name `address@ip`.
    `ip` is an IPv4 or IPv6 address without brackets, or `unix:/path` with port 0.
    """

    key: str
    address: str
    ip: str
    port: int
    weight: int = 1
    backup: bool = False
    down: bool = False
    max_conns: int = 0
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How many results in a row change a verdict."""

    rise: int = 2
    fall: int = 3


@dataclass(frozen=True, slots=True)
class WarmUpPolicy:
    """weight(t) = weight * max(floor, (t / duration) ** curve), full from `duration` on (Envoy, Sermant, HAProxy).

    `starts` is `first-request` or `healthy`. A duration of 0 means no warm-up.
    """

    duration: float = 120.0
    curve: float = 1.0
    floor: float = 0.1
    starts: str = "first-request"


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """How long in-flight requests may take, and what then: `abort` (back to ready) or `proceed`.

    `settle` is the wait after deregistration before the process is told to stop.
    """

    timeout: float = 30.0
    on_timeout: str = "abort"
    settle: float = 3.0


@dataclass(frozen=True, slots=True)
class ProcessPolicy:
    """How a server's process is found, stopped and started.

    `kind` is `gunicorn` or `systemd`. Placeholders `{upstream} {address} {host} {port}` stand in `unit`, `pid_file`,
    `start`, `directory`, `log` and `environment`. `graceful_timeout` is the application's own; KILL comes `margin`
    later.
    """

    kind: str = "gunicorn"
    unit: str | None = None
    pid_file: str | None = None
    start: tuple[str, ...] = ()
    directory: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    log: str | None = None
    graceful_timeout: float = 30.0
    margin: float = 5.0
    start_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """`ready_time`: how long a server must stay up and warm before the next batch; `up_timeout`: how long it may take
    from its start until the probes call it up."""

    ready_time: float = 0.0
    up_timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything that is configured for one upstream in headgate.toml and matters to decisions."""

    health: HealthPolicy = HealthPolicy()
    warm_up: WarmUpPolicy = WarmUpPolicy()
    drain: DrainPolicy = DrainPolicy()
    rollout: RolloutPolicy = RolloutPolicy()
    process: ProcessPolicy | None = None


@dataclass(frozen=True, slots=True)
class Upstream:
    """An upstream as configured: nginx's block and headgate.toml's policy.

    `hash_key` (a text with nginx's variables) and `consistent` belong to the method `hash`, `two` to `random`.
    """

    name: str
    servers: tuple[Server, ...]
    method: str = "round_robin"
    policy: Policy = Policy()
    place: Place | None = None
    hash_key: str = ""
    consistent: bool = False
    two: bool = False


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A peer's slow start: `elapsed` seconds had passed at `since`; `epoch` tells one warm-up from the next."""

    phase: Warmth = Warmth.NONE
    elapsed: float = 0.0
    since: float = 0.0
    epoch: int = 0
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """No traffic until `until`, because of `why`."""

    until: float
    why: str


@dataclass(frozen=True, slots=True)
class Peer:
    """The living side of a server. `incumbent`: nginx was sending to it before Headgate knew it, so unknown serves.

    `passes` and `fails` count results in a row; each result resets the other.
    """

    admin: Admin = Admin.READY
    health: Health = Health.UNKNOWN
    reason: str = ""
    passes: int = 0
    fails: int = 0
    incumbent: bool = False
    warm_up: WarmUp = WarmUp()
    quarantine: tuple[Quarantine, ...] = ()


@dataclass(frozen=True, slots=True)
class Master:
    """A verified process: the pid alone is not an identity, (pid, created) is. `workers` are its children then."""

    pid: int
    created: float
    executable: str
    workers: tuple[tuple[int, float], ...] = ()
    unit: str | None = None


class ChangeKind(enum.StrEnum):
    """The operations that are recorded step by step."""

    DRAIN = "drain"
    STOP = "stop"
    START = "start"
    RESTART = "restart"
    ROLLOUT = "rollout"


class StepName(enum.StrEnum):
    """The stages of going offline and coming online, in their order (design: going offline, in order)."""

    FIND = "find"
    DRAIN = "drain"
    EMPTY = "empty"
    SETTLE = "settle"
    TERMINATE = "terminate"
    EXIT = "exit"
    KILL = "kill"
    START = "start"
    UP = "up"
    WARM = "warm"
    HOLD = "hold"


class StepState(enum.StrEnum):
    """How far one step is."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


class ChangeStatus(enum.StrEnum):
    """How far a change is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded stage for one server. Steps of a lower `batch` end before those of the next one begin."""

    name: StepName
    server: str
    batch: int = 0
    state: StepState = StepState.PENDING
    started: float | None = None
    ended: float | None = None
    detail: str = ""
    master: Master | None = None  # what `find` found
    revision: int = 0  # the table that `drain` waits for
    admin: Admin | None = None  # what `drain` found, to go back to


@dataclass(frozen=True, slots=True)
class Change:
    """An operation as data: what was asked, and every step with its time and outcome."""

    id: int
    kind: ChangeKind
    upstream: str
    steps: tuple[Step, ...]
    created: float
    forced: bool = False
    status: ChangeStatus = ChangeStatus.RUNNING
    ended: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """An upstream and its peers by key. `fail_open`: no server is up, so those that are merely down serve."""

    upstream: Upstream
    peers: Mapping[str, Peer]
    fail_open: bool = False


@dataclass(frozen=True, slots=True)
class Plane:
    """The data plane as last seen: `revision` is what nginx serves, `boot` changes when nginx was restarted."""

    boot: str = ""
    revision: int = 0
    error: str = "not seen yet"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that decisions rest on. `revision` numbers the routing table that follows from it."""

    revision: int = 0
    groups: Mapping[str, Group] = field(default_factory=dict)
    changes: Mapping[int, Change] = field(default_factory=dict)
    next_change: int = 1
    next_epoch: int = 1
    plane: Plane = Plane()
    config_error: str = ""
    configured: bool = False  # nginx.conf has been read in this life
    stored: Mapping[tuple[str, str], Peer] = field(default_factory=dict)  # of an earlier life, until nginx.conf is read
