"""What was: traffic second by second, and a server's story in sentences. Routes and their shapes; what the sentences
say stands in explain.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import FastAPI, Query
from pydantic import BaseModel

from controller.api import views, wire
from controller.api.explain import Facts, explain, warmed
from controller.api.face import Runtime
from controller.core.change import group_of, resolve
from controller.core.model import Refused

POINTS = 10_000
"""The most steps that one answer may have."""
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
_WANTED = 30  # steps, where the caller does not say
_SPAN = 300  # seconds, the same
_EVENTS = 500
_LOOK_BACK = 3600  # seconds whose traffic is looked at to explain something

_Upstream = Annotated[str, Query(description="The upstream's name in nginx.conf.")]
_Time = Query(ge=0, le=1e11, allow_inf_nan=False)


class Point(BaseModel):
    """What a server got in the step that begins `at`; `response_time` is the mean of what was answered, or null.

    Counts are fractions where a reading of nginx's counters was spread over more than one step.
    """

    at: int
    requests: float
    answered: float
    errors: float
    failures: float
    in_flight: int
    response_time: float | None


class Series(BaseModel):
    """A server's points; a step without traffic has none."""

    server: str
    points: list[Point]


class Traffic(BaseModel):
    """What an upstream's servers got, in steps of `step` seconds from `since` on, and what happened meanwhile."""

    upstream: str
    since: int
    until: int
    step: int
    servers: list[Series]
    events: list[wire.EventView]


class Answer(BaseModel):
    """A question, and what the records say to it."""

    question: str
    sentences: list[str]


class Story(BaseModel):
    """What the records say of one server."""

    server: str
    answers: list[Answer]


class Explanation(BaseModel):
    """A server explained; a host name has a story for each of its addresses."""

    upstream: str
    servers: list[Story]


def add_history(app: FastAPI, runtime: Runtime) -> None:
    """Add the routes to this app."""

    @app.get("/v1/traffic", tags=["history"])
    async def traffic(
        upstream: _Upstream,
        since: Annotated[float | None, _Time] = None,
        until: Annotated[float | None, _Time] = None,
        step: Annotated[int | None, Query(ge=1, le=86400, description="Seconds.")] = None,
    ) -> Traffic:
        """What each server got, step by step, with the events of that time; without `since` the last five minutes."""
        group = group_of(runtime.state, upstream)
        last = runtime.clock.wall() if until is None else until
        first = last - _SPAN if since is None else since
        width = step or next((each for each in _STEPS if (last - first) / each <= _WANTED), _STEPS[-1])
        begin, end = int(first // width * width), int(-(-last // width) * width)
        if (end - begin) / width > POINTS:
            raise Refused("invalid", f"more than {POINTS:,} steps of {width} s", "ask for less time, or a longer step")
        series: dict[str, list[Point]] = {server.key: [] for server in group.upstream.servers}
        for row in await runtime.traffic(upstream, begin, end, width):
            counts = (round(each, 3) for each in (row.requests, row.answered, row.errors, row.failures))
            requests, answered, errors, failures = counts
            mean = row.seconds / row.answered if row.answered else None
            series.setdefault(row.server, []).append(
                Point(
                    at=row.at,
                    requests=requests,
                    answered=answered,
                    errors=errors,
                    failures=failures,
                    in_flight=row.in_flight,
                    response_time=mean,
                )
            )
        events = await runtime.store.events_between(upstream, begin, end, _EVENTS)
        return Traffic(
            upstream=upstream,
            since=begin,
            until=end,
            step=width,
            servers=[Series(server=server, points=points) for server, points in series.items()],
            events=[views.event(event) for event in events],
        )

    @app.get("/v1/explain", tags=["history"])
    async def explained(
        upstream: _Upstream,
        server: Annotated[str, Query(description="The server's address as written in nginx.conf.")],
    ) -> Explanation:
        """Why a server gets what it gets: in sentences, from what was recorded."""
        state = runtime.state
        group = group_of(state, upstream)
        wall = int(runtime.clock.wall())
        stories = []
        for key in resolve(group, (server,)):
            facts = Facts(
                state=state,
                group=group,
                key=key,
                counters=runtime.counters,
                data_plane=runtime.data_plane,
                now=runtime.clock.now(),
                wall=runtime.clock.wall(),
                events=await runtime.store.events_of(upstream, key, _EVENTS),
                change=await runtime.store.last_change(upstream, key),
                traffic=await runtime.traffic(upstream, wall - _LOOK_BACK, wall + 1, 1, key),
            )
            if span := warmed(facts):
                since, until = span[0], min(span[1], wall)
                rows = await runtime.traffic(upstream, since, until, max(1, until - since))
                facts = replace(facts, rate=sum(row.requests for row in rows) / max(1, until - since))
            answers = [Answer(question=question, sentences=list(said)) for question, said in explain(facts)]
            stories.append(Story(server=key, answers=answers))
        return Explanation(upstream=upstream, servers=stories)
