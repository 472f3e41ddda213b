"""The tables of headgate.toml that can differ from one upstream to the next, `[defaults.X]` and `[upstream.NAME.X]`."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from controller.core.policy import (
    BalancePolicy,
    DrainPolicy,
    HealthPolicy,
    NoticePolicy,
    OutlierPolicy,
    Policy,
    ProcessPolicy,
    QuarantinePolicy,
    RolloutPolicy,
    StickyPolicy,
    WarmUpPolicy,
)
from controller.settings.hooks import HooksTable
from controller.settings.values import (
    CookieName,
    CookiePath,
    Duration,
    Header,
    HostName,
    PositiveDuration,
    ReadableFile,
    Share,
    Statuses,
    Table,
    Template,
    TemplatePath,
    Url,
    UrlPath,
    Variables,
)

_WEB, _TLS, _GRPC = ("http", "https"), ("https", "grpcs"), ("grpc", "grpcs")
BELONGS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "check": (
        "type",
        {
            **dict.fromkeys(("path", "statuses", "body", "header"), _WEB),
            **dict.fromkeys(("ca_file", "client_cert", "client_key", "server_name", "verify"), _TLS),
            "host": _WEB + _GRPC,
            "service": _GRPC,
            "send": ("agent",),
        },
    ),
    "balance": ("method", {"key": ("hash",), "consistent": ("hash",), "bound": ("", "hash"), "two": ("random",)}),
}
"""By table: the key that says its kind, and the kinds that another key means something to. Keys that are not here mean
something to all."""


def _see_fitting(table: Table, name: str) -> None:
    """Refuse what means nothing to the table's kind."""
    of, belongs = BELONGS[name]
    kind = getattr(table, of)
    for key in sorted(table.model_fields_set & belongs.keys()):
        if kind not in belongs[key] and getattr(table, key) != type(table).model_fields[key].default:
            kinds = " or ".join(f'"{each}"' for each in belongs[key] if each)
            nothing = f'to {of} = "{kind}"' if kind else f"without {of}"
            raise ValueError(f"{key} means nothing {nothing}; take it out, or write {of} = {kinds}")


class CheckTable(Table):
    """[*.check]: how a server is probed, and how many results change the verdict."""

    type: Literal["http", "https", "tcp", "grpc", "grpcs", "agent"] = "http"
    path: UrlPath = "/healthz"
    host: HostName | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    interval: Annotated[Duration, Field(ge=0.1)] = 2.0
    fast_interval: Annotated[Duration, Field(ge=0.1)] | None = None
    down_interval: Annotated[Duration, Field(ge=0.1)] | None = None
    timeout: PositiveDuration = 1.0
    jitter: Annotated[Share, Field(le=0.5)] = 0.1
    rise: Annotated[int, Field(ge=1)] = 2
    fall: Annotated[int, Field(ge=1)] = 3
    statuses: Statuses = ((200, 399),)
    body: Annotated[str, Field(min_length=1)] | None = None
    header: Header | None = None
    ca_file: ReadableFile | None = None
    client_cert: ReadableFile | None = None
    client_key: ReadableFile | None = None
    server_name: HostName | None = None
    verify: bool = True
    service: str = ""
    send: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _see_fitting(self, "check")
        if self.client_key and not self.client_cert:
            raise ValueError("client_key without client_cert; name the certificate, too, or take client_key out")
        _see_files(self.ca_file, self.client_cert, self.client_key)
        if (self.fast_interval or 0) > self.interval:
            raise ValueError(
                f"fast_interval ({self.fast_interval:g} s) is longer than interval ({self.interval:g} s); shorten it"
            )
        for name in ("interval", "fast_interval", "down_interval"):
            _see_time(self.timeout, name, getattr(self, name))
        return self


def _see_files(ca_file: str | None, cert: str | None, key: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except OSError as error:
        raise ValueError(f"ca_file {ca_file!r} holds no certificates in PEM ({error}); correct it") from error
    try:
        if cert:
            context.load_cert_chain(cert, key, password="")  # without one OpenSSL would ask the terminal
    except OSError as error:
        raise ValueError(
            f"{cert!r} and {key or cert!r} are not a certificate and its key ({error}); "
            "write PEM files that belong together, the key without a password"
        ) from error


def _see_time(timeout: float, name: str, interval: float | None) -> None:
    if interval is not None and timeout > interval:
        raise ValueError(f"timeout ({timeout:g} s) is longer than {name} ({interval:g} s); shorten it")


class AgentTable(Table):
    """[*.agent]: a second check that asks the backend for its load, in the words of HAProxy's agent check."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    interval: Annotated[Duration, Field(ge=0.1)] = 2.0
    timeout: PositiveDuration = 1.0
    send: str = ""

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        _see_time(self.timeout, "interval", self.interval)
        return self


class HealthTable(Table):
    """[*.health]: what becomes of a server's verdicts."""

    detector: Literal["count", "accrual"] = "count"
    phi: Annotated[float, Field(gt=0, le=100, strict=False)] = 8.0
    panic: Share = 0.0
    flaps: Annotated[int, Field(ge=0)] = 5
    flap_window: PositiveDuration = 60.0
    flap_hold: PositiveDuration = 30.0
    flap_cap: PositiveDuration = 300.0

    @model_validator(mode="after")
    def _capped(self) -> Self:
        _see_cap("flap_hold", self.flap_hold, "flap_cap", self.flap_cap)
        return self


def _see_cap(name: str, value: float, cap_name: str, cap: float) -> None:
    if value > cap:
        raise ValueError(
            f"{name} ({value:g} s) is longer than {cap_name} ({cap:g} s); shorten it, or lengthen {cap_name}"
        )


InARow = Annotated[int, Field(ge=0, le=1_000_000)]


class OutlierTable(Table):
    """[*.outlier]: passive checks, by what the traffic shows."""

    errors: InARow = 5
    timeouts: InARow = 5
    server_errors: InARow = 5
    interval: Annotated[Duration, Field(ge=1)] = 10.0
    base: PositiveDuration = 30.0
    cap: PositiveDuration = 300.0
    max_ejected: Share = 0.1
    hosts: Annotated[int, Field(ge=2)] = 5
    requests: Annotated[int, Field(ge=1)] = 100
    success_rate: Annotated[float, Field(ge=0, le=100, strict=False)] = 1.9
    latency: Annotated[float, Field(ge=0, le=1000, strict=False)] = 5.0

    @model_validator(mode="after")
    def _capped(self) -> Self:
        _see_cap("base", self.base, "cap", self.cap)
        return self


class QuarantineTable(Table):
    """[*.quarantine]: what an offline notice does."""

    duration: PositiveDuration = 120.0
    marks: bool = True


class NoticesTable(Table):
    """[*.notices]: who is told that a server goes offline."""

    enabled: bool = False
    consumers: Annotated[tuple[Url, ...], Field(strict=False)] = ()
    tries: Annotated[int, Field(ge=1, le=10)] = 3
    timeout: PositiveDuration = 1.0
    deadline: PositiveDuration = 5.0

    @model_validator(mode="after")
    def _has_consumers(self) -> Self:
        if self.enabled and not self.consumers:
            raise ValueError('enabled without consumers; write consumers = ["http://…"], or take enabled out')
        return self


class BalanceTable(Table):
    """[*.balance]: the method, where it is not nginx.conf's."""

    method: Literal["", "round_robin", "least_conn", "ewma", "hash", "ip_hash", "random"] = ""
    key: Variables = ""
    consistent: bool = True
    bound: Annotated[float, Field(ge=0, le=100, strict=False)] = 0.0
    two: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method == "hash" and not self.key:
            raise ValueError('method = "hash" needs a key; write key = "$remote_addr", or another variable of nginx')
        if 0 < self.bound < 1:
            raise ValueError(f"bound = {self.bound:g} leaves requests without a server; write 1.25, or 0 for none")
        _see_fitting(self, "balance")
        if self.bound and not self.consistent:
            raise ValueError(f"bound = {self.bound:g} needs a consistent hash; write bound = 0, or consistent = true")
        return self


class StickyTable(Table):
    """[*.sticky]: sessions bound to a server by a cookie."""

    cookie: CookieName = ""
    path: CookiePath = "/"
    secure: bool = True
    http_only: bool = True
    same_site: Literal["Strict", "Lax", "None"] = "Lax"
    max_age: Annotated[int, Field(ge=0, le=2**31)] = 0
    drain: Duration = 30.0
    idle: PositiveDuration = 5.0

    @model_validator(mode="after")
    def _is_kept(self) -> Self:
        if self.same_site == "None" and not self.secure:
            raise ValueError(
                'same_site = "None" without secure is dropped by browsers; write secure = true, or same_site = "Lax"'
            )
        return self


class WarmUpTable(Table):
    """[*.warm_up]: how a server that comes online gets its share."""

    duration: Duration = 120.0
    curve: Annotated[float, Field(gt=0, le=100, strict=False)] = 1.0
    floor: Annotated[Share, Field(gt=0)] = 0.1
    steps: Annotated[int, Field(ge=0, le=1000)] = 0
    starts: Literal["first-request", "healthy"] = "first-request"
    ignore_paths: Annotated[tuple[UrlPath, ...], Field(strict=False)] = ()
    max_cold: Annotated[Share, Field(gt=0)] = 0.5
    hold_errors: Annotated[float, Field(ge=0, le=1000, strict=False)] = 2.0
    hold_latency: Annotated[float, Field(ge=0, le=1000, strict=False)] = 3.0
    hold_requests: Annotated[int, Field(ge=1)] = 20
    hold_window: Annotated[Duration, Field(ge=1)] = 5.0
    step_back: PositiveDuration = 30.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps == 1:
            raise ValueError('steps = 1 is the full weight at once; write 2 or more, or duration = "0s" for no warm-up')
        if any("?" in path for path in self.ignore_paths):
            raise ValueError('ignore_paths are compared without the query; leave out "?" and what follows')
        return self


class DrainTable(Table):
    """[*.drain]: how a server that goes offline is emptied."""

    timeout: Duration = 30.0
    on_timeout: Literal["abort", "proceed"] = "abort"
    settle: Duration = 3.0


class RolloutTable(Table):
    """[*.rollout]: when a change takes the next batch, and when it stops."""

    ready_time: Duration = 0.0
    up_timeout: PositiveDuration = 60.0
    max_load: Annotated[float, Field(ge=0, le=1000, strict=False)] = 2.0
    capacity: Annotated[float, Field(ge=0, le=1e9, strict=False)] = 0.0
    max_errors: Share = 0.2
    max_latency: Annotated[float, Field(ge=0, le=1000, strict=False)] = 0.0
    min_requests: Annotated[int, Field(ge=1)] = 100
    window: Annotated[Duration, Field(ge=1)] = 10.0
    on_failure: Literal["stop", "roll-back"] = "stop"
    warm_timeout: PositiveDuration | None = None
    wait_timeout: PositiveDuration = 600.0

    @model_validator(mode="after")
    def _allows(self) -> Self:
        if 0 < self.max_load < 1:
            raise ValueError(f"max_load = {self.max_load:g} is below the usual share; write 2.0, or 0 for no limit")
        if 0 < self.max_latency <= 1:
            raise ValueError(
                f"max_latency = {self.max_latency:g} is no longer than before; write 2.0, or 0 for no limit"
            )
        return self


class ProcessTable(Table):
    """[*.process]: how a server's process is found, stopped and started. Without it Headgate signals nothing."""

    kind: Literal["gunicorn", "systemd"] = "gunicorn"
    unit: Template | None = None
    pid_file: TemplatePath | None = None
    start: Annotated[tuple[str, ...], Field(strict=False)] = ()
    directory: TemplatePath | None = None
    environment: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    log: TemplatePath | None = None
    graceful_timeout: Duration = 30.0
    margin: Duration = 5.0
    start_timeout: PositiveDuration = 30.0
    deploy: Annotated[tuple[str, ...], Field(strict=False)] = ()
    roll_back: Annotated[tuple[str, ...], Field(strict=False)] = ()
    deploy_timeout: PositiveDuration = 300.0

    @model_validator(mode="after")
    def _has_unit(self) -> Self:
        if self.kind == "systemd" and self.unit is None:
            raise ValueError('kind = "systemd" needs a unit; write unit = "app@{port}.service"')
        return self


class Tables(Table):
    """[defaults] and [upstream.NAME]: everything that can differ from one upstream to the next."""

    check: CheckTable = CheckTable()
    warm_up: WarmUpTable = WarmUpTable()
    drain: DrainTable = DrainTable()
    rollout: RolloutTable = RolloutTable()
    process: ProcessTable | None = None
    agent: AgentTable = AgentTable()
    health: HealthTable = HealthTable()
    outlier: OutlierTable = OutlierTable()
    quarantine: QuarantineTable = QuarantineTable()
    notices: NoticesTable = NoticesTable()
    balance: BalanceTable = BalanceTable()
    sticky: StickyTable = StickyTable()
    hooks: HooksTable = HooksTable()

    @model_validator(mode="after")
    def _one_agent(self) -> Self:
        if self.check.type == "agent" and self.agent.port:
            raise ValueError('check.type = "agent" and agent.port are two agents of one server; take one of them out')
        return self

    def policy(self) -> Policy:
        """These settings as the core takes them."""
        return Policy(
            health=HealthPolicy(
                self.check.rise,
                self.check.fall,
                **self.health.model_dump(),
                agent=self.agent.port is not None or self.check.type == "agent",
            ),
            warm_up=WarmUpPolicy(**self.warm_up.model_dump()),
            drain=DrainPolicy(**self.drain.model_dump()),
            rollout=RolloutPolicy(**self.rollout.model_dump()),
            process=ProcessPolicy(**self.process.model_dump()) if self.process else None,
            balance=BalancePolicy(**self.balance.model_dump()),
            sticky=StickyPolicy(**self.sticky.model_dump()),
            outlier=OutlierPolicy(**self.outlier.model_dump()),
            quarantine=QuarantinePolicy(**self.quarantine.model_dump()),
            notices=NoticePolicy(**self.notices.model_dump()),
            hooks=self.hooks.policy(),
        )
