"""GET /v1/upstreams/{upstream}/plan: what an operation would do, from the live state and what was measured before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query
from pydantic import BaseModel, ValidationError

from controller.api import wire
from controller.api.face import Runtime
from controller.core import plan, traffic
from controller.core.change import group_of
from controller.core.events import ChangeWished, ConfigRead, ProbeResult
from controller.core.model import ChangeKind, Group, Readings, Refused, State, StepName, Traffic
from controller.core.step import step
from controller.core.steps import STEPS
from controller.errors import ApiError
from controller.ports import Check, Counters, NginxConfig

REMEMBERED = 5
"""Of so many of the newest operations of an upstream is learned how long their steps took."""
PATIENCE = 2.0
"""Seconds that a change waits, before it begins, for what is foreseen of it."""
_LOOKED_AT = 50  # newest changes, of all upstreams, among which these are looked for
_LEAST = 1.0  # seconds of traffic below which no rate is told
_SHOWN = 60  # samples at most


class BatchView(BaseModel):
    """Servers that go at once: from when to when, the least part of the upstream's weight that serves then, and the
    highest multiple of its usual share that a server gets."""

    servers: list[str]
    begins: float
    ends: float
    capacity: float
    load: float
    server: str


class SampleView(BaseModel):
    """The upstream at a time: `capacity` and `cold` are parts of 1, `load` is a multiple of the usual share."""

    at: float
    capacity: float
    load: float
    server: str
    cold: float


class AdviceView(BaseModel):
    """The largest batch that is safe, with seconds in all and from one batch to the next; not `safe`: even one server
    at once is too much."""

    batch: int
    duration: float
    spacing: float
    load: float
    safe: bool


class PlanView(BaseModel):
    """What an operation would do. `count` batches in all; of many only the heaviest are in `batches`.

    `capacity` is the least part of the upstream's weight that serves, `load` the highest multiple of its usual share
    that a server gets, `loads` that of each. `rate` are requests a second now, `in_flight` those under way, null where
    not known. `seconds` are what steps are taken to last. `error`: why it would fail.
    """

    kind: ChangeKind
    upstream: str
    batch: int
    count: int
    duration: float
    spacing: float
    capacity: float
    load: float
    server: str
    cold: float
    loads: dict[str, float]
    rate: float | None
    in_flight: int | None
    seconds: dict[str, float]
    batches: list[BatchView]
    samples: list[SampleView]
    surge: str
    warnings: list[str]
    advice: AdviceView | None
    error: str


def add_plan(app: FastAPI, runtime: Runtime) -> None:
    """Add the route."""

    @app.get("/v1/upstreams/{upstream}/plan", tags=["changes"])
    async def plan_change(
        upstream: Annotated[str, Path(description="The upstream's name in nginx.conf.")],
        kind: ChangeKind = ChangeKind.ROLLOUT,
        servers: Annotated[list[str], Query(description="None: all of the upstream.")] = [],  # noqa: B006 - FastAPI copies it
        batch: Annotated[str, Query(max_length=20, description="How many at once, or N%; empty: as it would be.")] = "",
        capacity: Annotated[
            float | None, Query(gt=0, allow_inf_nan=False, description="Requests/s that a server of weight 1 can take.")
        ] = None,
        force: bool = False,
        max_unavailable: Annotated[
            str | None, Query(max_length=20, description="How many may be away at once, or N%.")
        ] = None,
        workers: Annotated[int, Query(ge=0, le=10_000, description="What a scale is to reach.")] = 0,
        advise: Annotated[bool, Query(description="Look for the batch to recommend, too.")] = True,
    ) -> PlanView:
        """What this operation would do to the capacity, and the batch that is safe; nothing is begun."""
        state, now = runtime.state, runtime.clock.now()
        group = group_of(state, upstream)
        wish = _wish(group, kind, tuple(servers), batch, max_unavailable, workers, force)
        observed, in_flight = await _observed(runtime, group, now)
        observed = replace(observed, capacity=capacity or _capacity(group))
        # A large upstream takes seconds, in which the daemon has other things to do.
        return await asyncio.to_thread(foresee, state, wish, observed, now, in_flight, advise)


async def foretold(runtime: Runtime, wish: ChangeWished) -> ChangeWished:
    """The wish with the requests a second that come now, and with what is foreseen of it, to be held against what then
    happens; without that where it cannot be granted, or where it takes longer than PATIENCE to reckon."""
    state, now = runtime.state, runtime.clock.now()
    observed, _ = await _observed(runtime, group_of(state, wish.upstream), now)
    wish = replace(wish, rate=observed.rate)
    try:
        async with asyncio.timeout(PATIENCE):
            return replace(wish, foreseen=await asyncio.to_thread(plan.foretell, state, wish, observed, now))
    except (Refused, TimeoutError):
        return wish


def foresee(
    state: State,
    wish: ChangeWished,
    observed: plan.Observed,
    now: float,
    in_flight: int | None = None,
    advise: bool = True,
) -> PlanView:
    """The plan of this wish, with the advice for what goes in batches; Refused."""
    policy = group_of(state, wish.upstream).upstream.policy
    foreseen = plan.simulate(state, wish, observed, now)
    advice = None
    returning = StepName.UP in STEPS[wish.kind]
    if advise and returning and len(foreseen.batches[0].servers) * foreseen.count > 1:
        advised = plan.advise(state, wish, observed, now)
        best = advised.plan
        advice = AdviceView(
            batch=best.batch, duration=best.duration, spacing=best.spacing, load=best.load, safe=advised.safe
        )
    samples = foreseen.samples
    return PlanView(
        kind=foreseen.kind,
        upstream=foreseen.upstream,
        batch=foreseen.batch,
        count=foreseen.count,
        duration=foreseen.duration,
        spacing=foreseen.spacing,
        capacity=foreseen.capacity,
        load=foreseen.load,
        server=foreseen.server,
        cold=foreseen.cold,
        loads=dict(foreseen.loads),
        rate=observed.rate,
        in_flight=in_flight,
        seconds={name.value: seconds for name, seconds in {**plan.USUAL, **observed.seconds}.items()},
        batches=[BatchView.model_validate(each, from_attributes=True) for each in foreseen.batches],
        samples=[SampleView.model_validate(each, from_attributes=True) for each in _thinned(samples)],
        surge=plan.surge(foreseen),
        warnings=[*plan.awaited(state, wish), *plan.warnings(foreseen, policy, observed)],
        advice=advice,
        error=foreseen.error,
    )


def planned_from(
    config: NginxConfig,
    check: Check,
    upstream: str,
    kind: str,
    servers: tuple[str, ...],
    batch: str,
    capacity: float | None,
    max_unavailable: str | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """The same answer without a daemon, for servers that are all up and warm; ApiError as the API would have it."""
    state, _ = step(State(), ConfigRead(config.upstreams), 0.0)
    try:
        group = group_of(state, upstream)
        for server in group.upstream.servers:
            for _ in range(group.upstream.policy.health.rise):
                state, _ = step(state, ProbeResult(upstream, server.key, True, "ok"), 0.0)
        wish = _wish(group, ChangeKind(kind), servers, batch, max_unavailable, workers)
        observed = plan.Observed(None, capacity or _capacity(group), _usual(check, group))
        return foresee(state, wish, observed, 0.0).model_dump(mode="json")
    except Refused as refusal:
        status = {"not_found": 404, "invalid": 422}.get(refusal.code, 409)
        raise ApiError(status, refusal.code, refusal.message, refusal.remedy) from refusal


def _wish(
    group: Group,
    kind: ChangeKind,
    servers: tuple[str, ...],
    batch: str,
    max_unavailable: str | None,
    workers: int,
    force: bool = False,
) -> ChangeWished:
    try:
        wanted = wire.ChangeWish(
            kind=kind,
            upstream=group.upstream.name,
            servers=list(servers),
            batch=_number(batch) if batch else None,
            force=force,
            max_unavailable=None if max_unavailable is None else _number(max_unavailable),
            workers=workers,
        )
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        value = {"batch": batch, "max_unavailable": max_unavailable}.get(str(name))
        raise Refused(
            "invalid", f"{name} {value!r} is no number of servers", "write 1 or more, or 1% to 100%"
        ) from error
    return wanted.event(len(group.upstream.servers))


def _capacity(group: Group) -> float | None:
    """Requests a second that a server of weight 1 can take, as configured."""
    return group.upstream.policy.rollout.capacity or None


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _usual(check: Check, group: Group) -> dict[StepName, float]:
    """Seconds until probes call up a server that was started, where it was never seen: `rise` probes, one at once."""
    interval = check.fast_interval or check.interval
    return {StepName.UP: (group.upstream.policy.health.rise - 1) * interval}


def observe(group: Group, counters: Counters, now: float) -> tuple[plan.Observed, int | None]:
    """The traffic of the last seconds: its rate, how long a drain takes, and how many requests are in flight.

    A drain lasts as long as requests stay: by their mean response time, which ends when an answer begins, or, where
    that is longer, by Little's law (in flight = rate x time), which counts streams and bodies, too.
    """
    seen = counters.upstreams.get(group.upstream.name)
    if seen is None:
        return plan.Observed(), None
    in_flight = sum(each.in_flight for each in seen.values())
    last = group.compared
    if last is None or last.boot != counters.boot or now - last.at < _LEAST:
        return plan.Observed(), in_flight
    newest = {
        key: Traffic(each.requests, each.answered, each.errors, each.failures, each.timeouts, each.seconds)
        for key, each in seen.items()
    }
    counts = traffic.between(last, Readings(now, counters.boot, newest)).values()
    requests, answered = sum(each.requests for each in counts), sum(each.answered for each in counts)
    rate = requests / (now - last.at)
    stays = max(sum(each.seconds for each in counts) / answered if answered else 0.0, in_flight / rate if rate else 0.0)
    return plan.Observed(rate, None, {StepName.EMPTY: stays} if stays else {}), in_flight


async def _observed(runtime: Runtime, group: Group, now: float) -> tuple[plan.Observed, int | None]:
    """All that is known of this upstream, but the capacity of its servers; and the requests in flight."""
    observed, in_flight = observe(group, runtime.counters, now)
    name = group.upstream.name
    seconds = {**_usual(runtime.check_for(name), group), **observed.seconds, **await _learned(runtime, name)}
    return replace(observed, seconds=seconds), in_flight


async def _learned(runtime: Runtime, upstream: str) -> dict[StepName, float]:
    """How long steps took in the newest operations of this upstream."""
    mine = [each for each in await runtime.store.changes(_LOOKED_AT) if each.upstream == upstream][:REMEMBERED]
    records = [await runtime.store.change(each.id) for each in mine]
    return plan.learned(
        (step.name, step.ended_at - step.started_at)
        for record in records
        if record
        for step in record.steps
        if step.state == "done" and step.started_at is not None and step.ended_at is not None
    )


def _thinned(samples: tuple[plan.Sample, ...]) -> list[plan.Sample]:
    """Evenly spread in time, so that a chart of them is true: the last one before each point of a grid."""
    end = samples[-1].at
    found: list[plan.Sample] = []
    at = 0
    for point in range(_SHOWN):
        while at + 1 < len(samples) and samples[at + 1].at <= end * point / (_SHOWN - 1):
            at += 1
        found.append(samples[at])
    return found
