"""The JSON shapes: what the API takes, what it answers, and the one error shape. Values only; how they are
filled stands in views.py, routes in app.py.

Times named `…_at` are seconds since the epoch, all others are durations in seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

from controller.api.planned import ForeseenView, HappenedView
from controller.core.events import ChangeWished
from controller.core.model import Admin, ChangeKind, ChangeStatus, Health, StepState, Warmth
from controller.ports import Parameter

MAX_ID = 2**63 - 1
"""The largest id that the store can hold."""


def _integral(value: object) -> object:
    """2.0 is an integer to JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sentence(text: str) -> str:
    """The text fit for one line of a log."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# --- what is asked ----------------------------------------------------------------------------------------------


class AdminWish(BaseModel):
    """What an operator wants of a server; `force` passes the guard against leaving no server."""

    model_config = ConfigDict(extra="forbid")

    admin: Admin
    force: StrictBool = False


_Count = Annotated[
    Annotated[StrictInt, Field(ge=1, le=MAX_ID)] | Annotated[str, Field(pattern=r"^(?:[1-9][0-9]?|100)%$")],
    BeforeValidator(_integral),
]


class ChangeWish(BaseModel):
    """An operation. No servers means all of the upstream; `batch` is how many at once, or a percentage of them.

    Without `batch` servers that go and come back do so one by one, others all at once. No server is taken away while
    more than `max_unavailable` (a number or percentage) would not serve. `workers` is what a scale is to reach,
    `weight` that of the servers of a scale-out. With `queue` a change that another one is in the way of waits for its
    end. With `roll_back` it goes back when it fails; null means as `rollout.on_failure` says.
    """

    model_config = ConfigDict(extra="forbid")

    kind: ChangeKind
    upstream: str
    servers: list[str] = []
    batch: _Count | None = None
    force: StrictBool = False
    max_unavailable: _Count | None = None
    workers: Annotated[StrictInt, Field(ge=0, le=10_000), BeforeValidator(_integral)] = 0
    weight: Annotated[StrictInt, Field(ge=1, le=1_000_000), BeforeValidator(_integral)] = 1
    queue: StrictBool = False
    roll_back: StrictBool | None = None

    def event(self, servers: int) -> ChangeWished:
        """The wish as the core takes it, in an upstream of so many servers."""
        return ChangeWished(
            self.kind,
            self.upstream,
            tuple(self.servers),
            _count(self.batch, servers) if self.batch else 0,
            self.force,
            _count(self.max_unavailable, servers) if self.max_unavailable else 0,
            self.workers,
            self.queue,
            self.roll_back,
            self.weight,
        )


def _count(wish: int | str, servers: int) -> int:
    """How many servers at once: a percentage of `servers`, rounded down, is at least one."""
    return wish if isinstance(wish, int) else max(1, servers * int(wish.removesuffix("%")) // 100)


class _Meant(BaseModel):
    """What the author of nginx.conf wants of a parameter that stands there as Headgate wrote it; null: nothing.

    The line is named by its address there and its number among equal ones.
    """

    model_config = ConfigDict(extra="forbid")

    upstream: str
    server: str
    number: Annotated[StrictInt, BeforeValidator(_integral), Field(ge=0, le=MAX_ID)] = 0


class MeantWeight(_Meant):
    """A weight."""

    parameter: Literal["weight"]
    value: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")] | None


class MeantDown(_Meant):
    """The mark `down`: the empty text."""

    parameter: Literal["down"]
    value: Literal[""] | None


class MeantMaxFails(_Meant):
    """A number of failures."""

    parameter: Literal["max_fails"]
    value: Annotated[str, Field(pattern=r"^[0-9]{1,9}$")] | None


class ConfigWish(BaseModel):
    """What else to know when nginx.conf is read."""

    model_config = ConfigDict(extra="forbid")

    meant: list[Annotated[MeantWeight | MeantDown | MeantMaxFails, Field(discriminator="parameter")]] = []

    def parameters(self) -> dict[Parameter, str | None]:
        """The same, by parameter."""
        return {(each.upstream, each.server, each.number, each.parameter): each.value for each in self.meant}


class OnlineNotice(BaseModel):
    """A server, as nginx.conf names it or by IP address and port; no upstream means every one that has it."""

    model_config = ConfigDict(extra="forbid")

    server: Annotated[str, Field(min_length=1, max_length=512)]
    upstream: str | None = None


class OfflineNotice(OnlineNotice):
    """A server goes offline. A notice whose `id` was heard before changes nothing.

    It gets no traffic for `seconds`, without them as long as is configured; `wait` is how many seconds the answer may
    wait for requests in flight.
    """

    id: Annotated[str, Field(max_length=200)] = ""
    seconds: Annotated[float, Field(strict=True, gt=0, le=86400, allow_inf_nan=False)] | None = None
    why: Annotated[str, Field(max_length=200), AfterValidator(_sentence)] = ""
    wait: Annotated[float, Field(strict=True, ge=0, le=600, allow_inf_nan=False)] = 0


# --- what is answered -------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """What went wrong: a stable word, a sentence with the place, and what can be done."""

    code: str
    message: str
    remedy: str


class ErrorAnswer(BaseModel):
    """The one error shape."""

    error: Problem


class Ready(BaseModel):
    """The daemon is alive, or ready."""

    ok: bool = True


class WarmUpView(BaseModel):
    """A slow start: seconds run of seconds in all, and the share of the full weight (0 to 1) that it gives now.

    `why` says what is wrong while it is held.
    """

    phase: Warmth
    elapsed: float
    duration: float
    share: float
    why: str


class QuarantineView(BaseModel):
    """No traffic for so many seconds more, and why. `kind` is notice, mark, flapping or outlier."""

    remaining: float
    why: str
    kind: str


class AgentView(BaseModel):
    """What a server's agent says: a factor for its weight, a wish, why it is down (empty: it is not), and the most
    requests at once (0: as nginx.conf says)."""

    weight: float
    admin: Admin
    down: str
    max_conns: int


class EjectedView(BaseModel):
    """nginx itself keeps the server away, for so many seconds more; `reason` is errors, timeouts, server_errors or
    mark, and it is for the `times`-th time."""

    reason: str
    remaining: float
    times: int


class ServerView(BaseModel):
    """A server as it is. `address` names it in every call: as written in nginx.conf, for a host name `name:port@ip`.

    `requests` counts tries since nginx started: `answered` ones, `errors` of them with a 5xx, and `failures` without an
    answer, `timeouts` of them. `response_time` is the mean of those that were answered, null where none was.
    `agent` and `ejected` are null where there is nothing to say. `change` is the unfinished change that it takes part
    in; `held` the change of another server that keeps it out of traffic, for both are one process.
    """

    address: str
    weight: int
    effective_weight: float
    admin: Admin
    health: Health
    reason: str
    warm_up: WarmUpView
    quarantine: list[QuarantineView]
    ejected: EjectedView | None
    agent: AgentView | None
    in_flight: int
    requests: int
    answered: int
    errors: int
    failures: int
    timeouts: int
    response_time: float | None
    change: int | None
    held: int | None


class UpstreamView(BaseModel):
    """An upstream and its servers; `fail_open` (panic): too few are up, so those that are merely down serve as well."""

    name: str
    method: str
    fail_open: bool
    servers: list[ServerView]


class ConfigView(BaseModel):
    """Whether nginx.conf could be read (`ok`), or not and why (`error`; the last good reading stays in force), or
    is read for the first time (`unread`)."""

    state: str
    error: str | None


class EdgeWish(BaseModel):
    """What an operator wants of this edge host."""

    model_config = ConfigDict(extra="forbid")

    offline: StrictBool


class EdgeState(BaseModel):
    """This edge host: whether it was taken offline, and why traffic should go to another one."""

    offline: bool
    takes_traffic: bool
    why: list[str]


class EdgeView(EdgeState):
    """The same, and how many TCP connections clients hold to its nginx."""

    connections: int


class Status(BaseModel):
    """Everything at a glance; `offline` says that this edge host as a whole was taken offline."""

    revision: int
    data_plane: str
    offline: bool
    config: ConfigView
    upstreams: list[UpstreamView]


class Upstreams(BaseModel):
    """The upstreams that Headgate drives, those that it leaves to nginx, and what was odd in nginx.conf."""

    upstreams: list[UpstreamView]
    unhooked: list[str]
    warnings: list[str]


class Servers(BaseModel):
    """The servers that an address names: one, or each address of a host name."""

    upstream: str
    servers: list[ServerView]


class AdminAnswer(BaseModel):
    """nginx serves this table revision, which holds the wish. `change` is the drain that was begun, if one was."""

    revision: int
    change: int | None


class Followed(BaseModel):
    """nginx serves this table revision, which holds the wish."""

    revision: int


class Emptying(BaseModel):
    """A server that gets no new request, and how many it still has."""

    upstream: str
    server: str
    in_flight: int


class InFlight(BaseModel):
    """Requests in flight at a server; for a host name, at each of its addresses."""

    servers: list[Emptying]


class OfflineAnswer(Followed):
    """The notice is acknowledged. `refused` says where the server stays, for no other one serves there; `replayed`: it
    was heard before; `drained`: no request is left anywhere, and none will come."""

    servers: list[Emptying]
    refused: list[str]
    replayed: bool
    drained: bool


class ConfigAnswer(BaseModel):
    """nginx.conf was read, and nginx serves this table revision, which follows from it."""

    revision: int
    warnings: list[str]


class ChangeBegun(BaseModel):
    """The change that was begun."""

    change: int


class Steered(BaseModel):
    """How the change stands now. One that was aborted or resumed may have ended meanwhile. Where one that had ended is
    rolled back, this is the change that does so."""

    change: int
    status: ChangeStatus


class StepView(BaseModel):
    """One stage for one server."""

    name: str
    server: str
    batch: int
    state: StepState
    started_at: float | None
    ended_at: float | None
    detail: str


class ChangeSummary(BaseModel):
    """A change without its steps. `batch` servers go at once, and at most `max_unavailable` may be away (null: no
    limit); `workers` is what a scale is to reach, otherwise null. Changes of versions before these have null."""

    id: int
    kind: ChangeKind
    upstream: str
    status: ChangeStatus
    forced: bool
    batch: int | None
    max_unavailable: int | None
    workers: int | None
    created_at: float
    ended_at: float | None
    error: str


class ChangeView(ChangeSummary):
    """A change with its steps; `version` counts the steps that started and those that ended. `plan` is what was
    foreseen when it was begun, `outcome` what it did; null where there is none, or not yet."""

    version: int
    steps: list[StepView]
    plan: ForeseenView | None
    outcome: HappenedView | None


class Changes(BaseModel):
    """Changes, newest first."""

    changes: list[ChangeSummary]


class EventView(BaseModel):
    """One recorded sentence; `id` grows."""

    id: int
    at: float
    kind: str
    text: str
    upstream: str
    server: str
    change: int | None


class Events(BaseModel):
    """Events in order."""

    events: list[EventView]
