"""The routes of this edge host as a whole: the answer for the tier above, and its being taken offline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query

from controller.api import wire
from controller.api.face import Runtime
from controller.api.problems import Failed
from controller.core import edge
from controller.ports import PlaneRefused, PlaneUnreachable

PUBLISH_SECONDS = 0.5
"""How long the check waits for a table that is on its way to nginx, so that news of servers do not unsettle it."""

_Upstreams = Annotated[list[str] | None, Query(description="Only these upstreams count; without it all do.")]


def add_check(app: FastAPI, runtime: Runtime) -> None:
    """Add what keepalived and load balancers ask."""

    @app.head("/healthz/traffic", include_in_schema=False)
    @app.get("/healthz/traffic", tags=["edge"])
    async def traffic(upstream: _Upstreams = None) -> wire.Ready:
        """200 while this edge takes traffic: it is not offline, nginx serves the newest table, the upstreams serve."""
        if why := await _obstacles(runtime, upstream or ()):
            remedy = "send traffic to another edge; `headgate status` says more"
            raise Failed(503, "edge_offline" if runtime.state.offline else "no_traffic", "; ".join(why), remedy)
        return wire.Ready()


def add_edge(app: FastAPI, runtime: Runtime) -> None:
    """Add the edge's own state."""

    @app.get("/v1/edge", tags=["edge"])
    async def read_edge() -> wire.EdgeView:
        """This edge host as the tier above should see it, and how many clients are connected to its nginx."""
        try:
            connections = await runtime.clients()
        except PlaneUnreachable as error:
            raise Failed(503, "not_counted", error.message, error.remedy) from error
        return wire.EdgeView(connections=connections, **await _state(runtime))

    @app.put("/v1/edge", tags=["edge"])
    async def set_edge(wish: wire.EdgeWish) -> wire.EdgeState:
        """Take this edge host offline, or back; it is remembered over restarts. nginx is left alone."""
        await runtime.set_edge(wish.offline)
        return wire.EdgeState(**await _state(runtime))


async def _state(runtime: Runtime) -> dict[str, Any]:
    why = await _obstacles(runtime, ())
    return {"offline": runtime.state.offline, "takes_traffic": not why, "why": why}


async def _obstacles(runtime: Runtime, upstreams: Sequence[str]) -> list[str]:
    with contextlib.suppress(PlaneUnreachable, PlaneRefused):  # then the state says so, too
        await runtime.published(PUBLISH_SECONDS)
    return edge.obstacles(runtime.state, upstreams)
