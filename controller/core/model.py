"""What Headgate knows: upstreams and servers as configured, peers as living things, changes as recorded steps.

Only frozen values and their small derived properties belong here; decisions stand in the modules beside this one.
All times are seconds of a monotonic clock, all durations are seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.core.policy import Policy


class Refused(Exception):
    """A wish that a guard or the present state does not allow; nothing has changed.

    `code` is one of `not_found`, `unread`, `busy`, `guard`, `invalid`; `remedy` says what the operator can do instead.
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
    QUEUED = "queued"  # healthy, but not in traffic yet: enough of its upstream is cold already
    WAITING = "waiting"  # for the first request
    RUNNING = "running"
    HELD = "held"  # it errs, is slower than its warm peers, or was taken out of traffic
    DONE = "done"


class Routing(enum.StrEnum):
    """A peer's state in the routing table: four facts folded into the one that a balancer needs."""

    UP = "up"
    DOWN = "down"
    DRAIN = "drain"
    SESSIONS = "sessions"  # drains, and keeps the requests that a sticky cookie binds to it
    MAINT = "maint"
    QUARANTINE = "quarantine"
    WAITING = "waiting"  # healthy, and waits for its turn to warm up


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
class Upstream:
    """An upstream as configured: nginx's block and headgate.toml's policy.

    `hash_key` (a text with nginx's variables) and `consistent` belong to the method `hash`, `two` to `random`.
    """

    name: str
    servers: tuple[Server, ...]
    method: str = "round_robin"
    policy: Policy = Policy()  # noqa: RUF009 - frozen
    place: Place | None = None
    hash_key: str = ""
    consistent: bool = False
    two: bool = False


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A peer's slow start: `elapsed` seconds had passed at `since`; `epoch` tells one warm-up from the next.

    While it is held, `since` is when the hold or its last step back began, and `why` says what is wrong.
    """

    phase: Warmth = Warmth.NONE
    elapsed: float = 0.0
    since: float = 0.0
    epoch: int = 0
    cause: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """No traffic until `until`, because of `why`. `kind` is notice, mark, flapping or outlier."""

    until: float
    why: str
    kind: str = "notice"


@dataclass(frozen=True, slots=True)
class Agent:
    """What a backend reports of itself, in the words of HAProxy's agent check. Only the agent reverts it.

    `weight` is a factor; `admin` is ready, drain or maint; `down` says why, or is empty; `max_conns` 0 means nginx's.
    """

    weight: float = 1.0
    admin: Admin = Admin.READY
    down: str = ""
    max_conns: int = 0


@dataclass(frozen=True, slots=True)
class Ejection:
    """nginx itself keeps a server away: `reason` is errors, timeouts, server_errors or mark."""

    until: float
    reason: str
    times: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """A server's counters since nginx started: tries begun, answers, 5xx answers, tries without an answer, those of
    them that timed out, and the sum of the response times in seconds.

    `epoch` is that of the warm-up which nginx knows of (None: none), `picked` whether it has picked the server in it.
    """

    requests: int = 0
    answered: int = 0
    errors: int = 0
    failures: int = 0
    timeouts: int = 0
    seconds: float = 0.0
    ejected: Ejection | None = None
    refused_marks: int = 0
    epoch: int | None = None
    picked: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """The living side of a server. `incumbent`: nginx was sending to it before Headgate knew it, so unknown serves.

    `passes` and `fails` count results in a row; each result resets the other. `changed` has the times of its last
    changes of health, `rests` counts how often it flapped, `ejections` how often it was an outlier; `taken_out`, which
    never falls, how often its traffic took it out: by an ejection, or as an outlier. `sessions`: it drains and still
    keeps its sticky sessions. A greater `forgiven` makes nginx forget its ejections. `held` is the id of the change of
    another server that keeps it out of traffic, for both are one process; 0: none.
    """

    admin: Admin = Admin.READY
    health: Health = Health.UNKNOWN
    reason: str = ""
    passes: int = 0
    fails: int = 0
    incumbent: bool = False
    warm_up: WarmUp = WarmUp()
    quarantine: tuple[Quarantine, ...] = ()
    agent: Agent = Agent()
    ejected: Ejection | None = None
    changed: tuple[float, ...] = ()
    rests: int = 0
    ejections: int = 0
    sessions: bool = False
    forgiven: int = 0
    taken_out: int = 0
    held: int = 0
    heard: tuple[str, ...] = ()  # the ids of the last notices


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
    RELOAD = "reload"  # HUP: new workers in the same master
    UPGRADE = "upgrade"  # USR2: a new master beside the old one
    DEPLOY = "deploy"  # a command between stop and start
    ROLL_BACK = "roll-back"  # the command that takes a deploy back, between stop and start
    SCALE = "scale"  # TTIN and TTOU: more or fewer workers
    SCALE_OUT = "scale-out"  # new `server` lines, whose processes are started
    SCALE_IN = "scale-in"  # servers go offline for good, and their `server` lines with them
    RESET = "reset"  # a restart that forgets what is held against a server


class StepName(enum.StrEnum):
    """The stages of going offline and coming online, in their order, with what each kind of change does between."""

    FIND = "find"
    BEFORE_DRAIN = "before_drain"
    DRAIN = "drain"
    NOTIFY = "notify"
    SESSIONS = "sessions"
    EMPTY = "empty"
    AFTER_DRAIN = "after_drain"
    SETTLE = "settle"
    TERMINATE = "terminate"
    EXIT = "exit"
    KILL = "kill"
    DEPLOY = "deploy"
    ROLL_BACK = "roll-back"
    RELOAD = "reload"
    WORKERS = "workers"
    UPGRADE = "upgrade"
    SCALE = "scale"
    ADD = "add"
    REMOVE = "remove"
    RESET = "reset"
    START = "start"
    UP = "up"
    AFTER_UP = "after_up"
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

    QUEUED = "queued"  # until those before it have ended
    RUNNING = "running"
    PAUSED = "paused"  # begins no further server
    ABORTING = "aborting"  # servers that were told to stop are brought to their end, nothing else
    ROLLING_BACK = "rolling-back"  # servers get back what they had before it
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"  # a later wish took its place

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left to do."""
        return self in (ChangeStatus.DONE, ChangeStatus.FAILED, ChangeStatus.ABORTED, ChangeStatus.SUPERSEDED)


class Steer(enum.StrEnum):
    """What an operator can want of a change that has not ended."""

    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLL_BACK = "roll-back"


@dataclass(frozen=True, slots=True)
class Mate:
    """A peer that is the same process as the server of a step, and whether it served when that was drained."""

    upstream: str
    server: str
    served: bool = False


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
    master: Master | None = None  # what it found, handles or made
    revision: int = 0  # the table that `drain` waits for
    admin: Admin | None = None  # what `drain` found, to go back to
    requests: int = -1  # what `sessions` last read of the server's counter
    quiet: float | None = None  # since when that has not changed; of `hold`, when its server is back in traffic
    taken_out: int = 0  # what its server's count of that was when it began
    mates: tuple[Mate, ...] = ()  # whom `drain` took out, too; of `empty`, all that are not proved empty yet


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a plan said of a change before it began: its `duration`, the least part of its upstream's weight
    (`capacity`) and the least number of servers that serve, of `before`, and the highest multiple of its usual share
    that a `server` gets, at `rate` requests a second (None: not known)."""

    duration: float
    capacity: float
    serving: int
    before: int
    load: float
    server: str
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """An operation as data: what was asked, and every step with its time and outcome.

    No server is taken away while more than `max_unavailable` would not serve (0: no limit). `batch` is how many go at
    once. `workers` is what a scale is to reach, `weight` that of the servers of a scale-out. `before` is the traffic
    that its upstream's budget is compared with, `foreseen` what was planned, `rate` the requests a second that came
    when it was wished (None: not known). With `roll_back` it goes back when it
    fails; the steps that do so are those from the batch `back` on (0: there are none).
    """

    id: int
    kind: ChangeKind
    upstream: str
    steps: tuple[Step, ...]
    created: float
    forced: bool = False
    status: ChangeStatus = ChangeStatus.RUNNING
    ended: float | None = None
    error: str = ""
    max_unavailable: int = 0
    workers: int = 0
    before: Traffic | None = None
    roll_back: bool = False
    back: int = 0
    foreseen: Foreseen | None = None
    rate: float | None = None
    batch: int = 1
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Readings:
    """The counters of an upstream's servers, by key, as they were `at` a time in the nginx that `boot` names."""

    at: float
    boot: str
    servers: Mapping[str, Traffic]


@dataclass(frozen=True, slots=True)
class Unpicked:
    """A server that nginx has not picked in its warm-up `epoch`: how many picks its upstream had when that was first
    seen, in the nginx that `boot` names, and whether it was `said`."""

    epoch: int
    boot: str
    picks: int
    said: bool = False


@dataclass(frozen=True, slots=True)
class Weighed:
    """How one server is judged by its traffic: the readings `since` which it is, and when that was last tried, `at`.

    `why` says what is wrong with it by the last verdict, which has been bad from `worse` on; empty where it is good.
    """

    since: Readings
    at: float
    worse: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Tally:
    """How many servers of an upstream serve by their own right, and how many would where it fails open (`able`); of
    its primary ones that people want to serve (`wanted`), how many are `up`.

    Of primaries and of backups: the weight of those that are well, and of those of them that warm up (`cold`), how
    many serve `warm`, and how many are `queued` to warm up.
    """

    serving: int = 0
    able: int = 0
    wanted: int = 0
    up: int = 0
    well: int = 0
    cold: int = 0
    warm: int = 0
    queued: int = 0
    backup_well: int = 0
    backup_cold: int = 0
    backup_warm: int = 0
    backup_queued: int = 0


@dataclass(frozen=True, slots=True)
class Departed:
    """A peer that left nginx.conf `at` a time."""

    peer: Peer
    at: float


@dataclass(frozen=True, slots=True)
class Group:
    """An upstream and its peers by key. `fail_open`: too few servers are up, so those that are merely down serve.
    `gone`: since when it has been missing from nginx.conf.

    `compared` are the readings since which outliers are looked for; `pseudo_dead` has, by key, how often a server had
    been forgiven when it was said that only its probes find it alive; `unpicked`, by key, the servers that warm up and
    were not picked yet; `weighed`, by key, those that warm up or have to prove themselves; `measured` are the readings
    since which the budget of a change is judged, and `usual` is what the upstream as a whole did in the last such
    window in which no change was under way. What stands here and not in a peer is not stored: it begins anew with the
    daemon.
    """

    upstream: Upstream
    peers: Mapping[str, Peer]
    tally: Tally = Tally()
    fail_open: bool = False
    compared: Readings | None = None
    pseudo_dead: Mapping[str, int] = field(default_factory=dict)
    unpicked: Mapping[str, Unpicked] = field(default_factory=dict)
    weighed: Mapping[str, Weighed] = field(default_factory=dict)
    measured: Readings | None = None
    usual: Traffic | None = None
    gone: float | None = None


@dataclass(frozen=True, slots=True)
class Plane:
    """The data plane as last seen: `revision` is what nginx serves, `boot` changes when nginx was restarted.

    `error`: why nothing is known of it now; `refused`: why it does not take the newest table.
    """

    boot: str = ""
    revision: int = 0
    error: str = "not seen yet"
    refused: str = ""

    @property
    def trouble(self) -> str:
        """Why nginx does not follow, empty where it does."""
        return self.error or self.refused


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
    offline: bool = False  # this edge host as a whole: the tier above is told to send its traffic elsewhere
    stored: Mapping[tuple[str, str], Peer] = field(default_factory=dict)  # of an earlier life, until nginx.conf is read
    departed: Mapping[tuple[str, str], Departed] = field(default_factory=dict)  # lately, from nginx.conf
    heartbeats: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)  # passed probes, for accrual
