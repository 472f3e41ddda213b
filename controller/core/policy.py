"""What is configured in headgate.toml for one upstream, as decisions need it. Durations are seconds, shares 0..1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """What changes a verdict: `rise` passes and `fall` failures in a row, or with `detector` `accrual` a suspicion phi.

    Below the share `panic` of servers that are up, health is ignored (0: only when none is). A server whose health
    changed more than `flaps` times (0: never) within `flap_window` seconds rests for `flap_hold`, longer each time,
    at most `flap_cap`. Without an `agent` nothing holds that one said before.
    """

    rise: int = 2
    fall: int = 3
    detector: str = "count"
    phi: float = 8.0
    panic: float = 0.0
    flaps: int = 5
    flap_window: float = 60.0
    flap_hold: float = 30.0
    flap_cap: float = 300.0
    agent: bool = False


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """Passive checks. `errors`, `timeouts` and `server_errors` in a row eject at once, in nginx (0: they do not).

    Every `interval` seconds servers with `requests` answers or more are compared, where at least `hosts` have that
    many: ejected is whose success rate lies more than `success_rate` standard deviations below the mean, or whose mean
    response time is more than `latency` times the median (0: neither). The n-th ejection lasts n times `base` seconds,
    at most `cap`; at most `max_ejected` of the servers, but always one, are away at a time.
    """

    errors: int = 5
    timeouts: int = 5
    server_errors: int = 5
    interval: float = 10.0
    base: float = 30.0
    cap: float = 300.0
    max_ejected: float = 0.1
    hosts: int = 5
    requests: int = 100
    success_rate: float = 1.9
    latency: float = 5.0


@dataclass(frozen=True, slots=True)
class QuarantinePolicy:
    """How many seconds an offline notice keeps a server away, and whether `marks` in responses are believed."""

    duration: float = 120.0
    marks: bool = True


@dataclass(frozen=True, slots=True)
class BalancePolicy:
    """The balancing method where it is not nginx.conf's (`method` empty: it is).

    `key`, `consistent` and `bound` belong to hash: no server takes more than `bound` times its fair share of the
    requests in flight (0: no limit). `two` belongs to random.
    """

    method: str = ""
    key: str = ""
    consistent: bool = True
    bound: float = 0.0
    two: bool = True


@dataclass(frozen=True, slots=True)
class StickyPolicy:
    """Sessions bound to a server by a cookie; an empty name: none.

    A draining server keeps its sessions for at most `drain` seconds, or until none of them asked for `idle` seconds.
    """

    cookie: str = ""
    path: str = "/"
    secure: bool = True
    http_only: bool = True
    same_site: str = "Lax"
    max_age: int = 0
    drain: float = 30.0
    idle: float = 5.0


@dataclass(frozen=True, slots=True)
class NoticePolicy:
    """Whom to tell that a server goes offline: `consumers` are URLs, each tried `tries` times, all in `deadline` s."""

    enabled: bool = False
    consumers: tuple[str, ...] = ()
    tries: int = 3
    timeout: float = 1.0
    deadline: float = 5.0


@dataclass(frozen=True, slots=True)
class Hook:
    """One call to the outside: an HTTP request, or a program where there is a `command`.

    `requests` are (method, URL). They are asked in turn until one answers with a status in one of the inclusive ranges
    `statuses`, which together is one of `tries`; each has `timeout` seconds. A command is run once, within `timeout`.
    `on_failure` is `abort`, which fails the step, or `proceed`. Texts may hold `{upstream} {address} {host} {port}`;
    URLs, headers and bodies also `{env:NAME}` and `{file:/path}`.
    """

    requests: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    statuses: tuple[tuple[int, int], ...] = ((200, 299),)
    command: tuple[str, ...] = ()
    tries: int = 3
    timeout: float = 5.0
    on_failure: str = "abort"


@dataclass(frozen=True, slots=True)
class HookPolicy:
    """What is called before a server leaves the traffic, when it is empty, and when its probes have passed again: with
    `register_at` `warm`, when its warm-up is over, too."""

    before_drain: tuple[Hook, ...] = ()
    after_drain: tuple[Hook, ...] = ()
    after_up: tuple[Hook, ...] = ()
    register_at: str = "up"


@dataclass(frozen=True, slots=True)
class WarmUpPolicy:
    """weight(t) = weight * max(floor, (t / duration) ** curve), full from `duration` on (Envoy, Sermant, HAProxy).

    With `steps` n it goes up in n stairs. `starts` is `first-request` or `healthy`; a request for one of
    `ignore_paths` is no first request. A duration of 0 means no warm-up. At most the share `max_cold` of an upstream's
    weight warms up at once, others wait; one server always may.

    The ramp holds while its server's error rate or mean response time is more than `hold_errors` or `hold_latency`
    times that of its warm peers (0: never), by at least `hold_requests` answers in `hold_window` seconds. After
    `step_back` seconds of that it goes back a tenth of the duration, and again.
    """

    duration: float = 120.0
    curve: float = 1.0
    floor: float = 0.1
    steps: int = 0
    starts: str = "first-request"
    ignore_paths: tuple[str, ...] = ()
    max_cold: float = 0.5
    hold_errors: float = 2.0
    hold_latency: float = 3.0
    hold_requests: int = 20
    hold_window: float = 5.0
    step_back: float = 30.0


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
    the commands, `directory`, `log` and `environment`. `graceful_timeout` is the application's own; KILL comes `margin`
    later. `deploy` is run between stop and start, `roll_back` takes it back; each has `deploy_timeout` seconds.
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
    deploy: tuple[str, ...] = ()
    roll_back: tuple[str, ...] = ()
    deploy_timeout: float = 300.0


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """`ready_time`: how long a server must stay up and warm before the next batch; `up_timeout`: how long it may take
    from its start until the probes call it up; `max_load`: above how many times its usual share no server may get
    (0: no limit); `capacity`: the requests a second that a server of weight 1 can take (0: not known).

    The budget of the whole upstream is judged every `window` seconds, by `min_requests` ended tries or more: a change
    stops when more than the share `max_errors` of them failed, or their mean response time is more than `max_latency`
    times that of before (0: neither). `on_failure` is `stop` or `roll-back`: what a change does that fails.

    `warm_timeout`: how long a server may take until it is warm, holds and all (None: five times the duration of the
    warm-up and ten of its `step_back`); `wait_timeout`: how long one may wait for others while the change gets on
    nowhere.
    """

    ready_time: float = 0.0
    up_timeout: float = 60.0
    max_load: float = 2.0
    capacity: float = 0.0
    max_errors: float = 0.2
    max_latency: float = 0.0
    min_requests: int = 100
    window: float = 10.0
    on_failure: str = "stop"
    warm_timeout: float | None = None
    wait_timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything that is configured for one upstream in headgate.toml and matters to decisions."""

    health: HealthPolicy = HealthPolicy()
    warm_up: WarmUpPolicy = WarmUpPolicy()
    drain: DrainPolicy = DrainPolicy()
    rollout: RolloutPolicy = RolloutPolicy()
    process: ProcessPolicy | None = None
    balance: BalancePolicy = BalancePolicy()
    sticky: StickyPolicy = StickyPolicy()
    outlier: OutlierPolicy = OutlierPolicy()
    quarantine: QuarantinePolicy = QuarantinePolicy()
    notices: NoticePolicy = NoticePolicy()
    hooks: HookPolicy = HookPolicy()
