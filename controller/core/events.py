"""What happened (an Event goes into `step`), and what is to be done (an Effect comes out of it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.core.model import Admin, Change, ChangeKind, Foreseen, Master, Peer, Steer, StepName, Traffic, Upstream


@dataclass(frozen=True, slots=True)
class Restored:
    """The store was read at start: the peers and unfinished changes of an earlier life.

    `away` is the time since it was last written. The deadlines of changes do not count it, for nobody could judge
    them then. Warm-ups and quarantines do, unless the machine was `rebooted` and its clock began anew.
    """

    revision: int
    next_change: int
    next_epoch: int
    peers: Mapping[tuple[str, str], Peer]
    changes: Mapping[int, Change]
    away: float = 0.0
    rebooted: bool = False


@dataclass(frozen=True, slots=True)
class ConfigRead:
    """nginx.conf and headgate.toml were read. `released` names the upstreams that stand there and are not ours."""

    upstreams: tuple[Upstream, ...]
    released: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConfigFailed:
    """nginx.conf could not be read; the old model stays."""

    error: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe ended. `reason` is ok, refused, reset, timeout, tls, status, header, body or error; `detail` is a
    phrase."""

    upstream: str
    server: str
    ok: bool
    reason: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class AgentSaid:
    """A server's agent answered with these words (HAProxy's agent check): `75% maxconn:30 up`."""

    upstream: str
    server: str
    words: str


@dataclass(frozen=True, slots=True)
class PlaneSeen:
    """nginx answered on its control socket (a status, or the acknowledgement of a table).

    `ours`: this life of the daemon sent it the table of that revision. Another one may differ, whatever its number.
    """

    boot: str
    revision: int
    ours: bool = True


@dataclass(frozen=True, slots=True)
class PlaneLost:
    """nginx did not answer."""

    error: str


@dataclass(frozen=True, slots=True)
class TableRefused:
    """nginx answered that it does not take the newest table; it goes on with the one before."""

    error: str


@dataclass(frozen=True, slots=True)
class PeerSeen:
    """A server's counters, read from nginx while it served `revision`."""

    upstream: str
    server: str
    revision: int
    in_flight: int
    warm_epoch: int | None = None
    warm_elapsed: float = 0.0
    warm_started: bool = False
    requests: int = 0


@dataclass(frozen=True, slots=True)
class TrafficSeen:
    """The counters of an upstream's servers by key, read from the nginx that `boot` names."""

    upstream: str
    boot: str
    servers: Mapping[str, Traffic]


@dataclass(frozen=True, slots=True)
class OfflineNoticed:
    """A server says, or somebody says for it, that it goes offline: it gets no traffic for `seconds` (None: as is
    configured). A notice whose `id` was seen before changes nothing."""

    upstream: str
    server: str
    id: str = ""
    seconds: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class OnlineNoticed:
    """A server says that it is there again: its quarantines end, and it is probed at once."""

    upstream: str
    server: str


@dataclass(frozen=True, slots=True)
class WarmUpWished:
    """An operator wants a server to warm up anew."""

    upstream: str
    server: str


@dataclass(frozen=True, slots=True)
class AdminWished:
    """An operator wants a server ready or under maintenance."""

    upstream: str
    server: str
    admin: Admin
    forced: bool = False


@dataclass(frozen=True, slots=True)
class ChangeWished:
    """An operator wants an operation. No servers means all of the upstream; `batch` is how many at once (0: one, where
    servers go and come back, else all).

    `queue`: where another change is in the way, wait for its end. `roll_back` None: as `rollout.on_failure` says. The
    rest is as in `model.Change`.
    """

    kind: ChangeKind
    upstream: str
    servers: tuple[str, ...] = ()
    batch: int = 0
    forced: bool = False
    max_unavailable: int = 0
    workers: int = 0
    queue: bool = False
    roll_back: bool | None = None
    weight: int = 1
    foreseen: Foreseen | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class SteerWished:
    """An operator wants a change paused, resumed, aborted or rolled back."""

    change: int
    steer: Steer


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that an adapter ran is done. `gone` is the answer of `exit`; `master` what it found or made."""

    change: int
    step: int
    detail: str = ""
    master: Master | None = None
    gone: bool = True


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A step that an adapter ran has failed; `message` has place and remedy."""

    change: int
    step: int
    message: str


@dataclass(frozen=True, slots=True)
class ConsumersTold:
    """Consumers were told that this server goes offline; `said` is who acknowledged, as a phrase."""

    upstream: str
    server: str
    said: str


@dataclass(frozen=True, slots=True)
class EdgeTold:
    """This edge host as a whole goes offline, or takes traffic again."""

    offline: bool


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


Event = (
    Restored
    | ConfigRead
    | ConfigFailed
    | ProbeResult
    | AgentSaid
    | PlaneSeen
    | PlaneLost
    | TableRefused
    | PeerSeen
    | TrafficSeen
    | OfflineNoticed
    | OnlineNoticed
    | WarmUpWished
    | AdminWished
    | ChangeWished
    | SteerWished
    | StepDone
    | StepFailed
    | ConsumersTold
    | EdgeTold
    | Ticked
)


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the event log: it serves log, store and page at once. `kind` is a stable word."""

    kind: str
    text: str
    upstream: str = ""
    server: str = ""
    change: int | None = None


@dataclass(frozen=True, slots=True)
class RunStep:
    """Do this step through an adapter and report StepDone or StepFailed. Safe to repeat after a crash.

    `alone`: nothing may serve in the place of `master` when it has ended.
    """

    change: int
    step: int
    name: StepName
    upstream: str
    server: str
    master: Master | None = None
    workers: int = 0
    alone: bool = False
    weight: int = 1


@dataclass(frozen=True, slots=True)
class ProbeNow:
    """Probe this server at once, from a clean slate."""

    upstream: str
    server: str


@dataclass(frozen=True, slots=True)
class TellConsumers:
    """Tell the upstream's consumers that this server goes offline, and report ConsumersTold."""

    upstream: str
    server: str


Effect = Note | RunStep | ProbeNow | TellConsumers


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step of the core gives back beside the state: effects, and the id of a change that was begun.

    `replayed`: the notice was heard before, and nothing has changed.
    """

    effects: tuple[Effect, ...] = field(default_factory=tuple)
    change: int | None = None
    replayed: bool = False
