"""MSE's `/readiness` and `/health`, for orchestrators and for the tier above: 500 until it is so, then 200."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path

from controller.api import wire
from controller.api.edge import add_check
from controller.api.face import Runtime
from controller.api.problems import Failed, answer_problems
from controller.core import warmup
from controller.core.model import Group, Refused, Routing, Warmth
from controller.core.notice import named
from controller.core.table import routing_of
from controller.ports import PlaneRefused, PlaneUnreachable

PUBLISH_SECONDS = 0.5
"""How long an answer waits for a table that is on its way to nginx, so that other servers' news do not unsettle it."""

_OUT = {
    Routing.DRAIN: "drains",
    Routing.SESSIONS: "drains, and keeps its sessions",
    Routing.MAINT: "is under maintenance",
    Routing.WAITING: "waits for its turn to warm up",
}


def readiness_app(runtime: Runtime, warm: bool) -> FastAPI:
    """An app with these two routes, the check of the edge host, and nothing else."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    answer_problems(app)
    add_readiness(app, runtime, warm)
    add_check(app, runtime)
    return app


def add_readiness(app: FastAPI, runtime: Runtime, warm: bool) -> None:
    """Add the routes. With `warm` a server is ready once its warm-up is over."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["readiness"])
    async def health() -> wire.Ready:
        """200 when nginx serves the newest table; else 500 and why."""
        await _served(runtime)
        return wire.Ready()

    @app.head("/readiness/{upstream}/{server:path}", include_in_schema=False)
    @app.get("/readiness/{upstream}/{server:path}", tags=["readiness"])
    async def readiness(
        upstream: Annotated[str, Path(description="The upstream's name in nginx.conf.")],
        server: Annotated[str, Path(description="The server's address as in nginx.conf, or its IP address and port.")],
    ) -> wire.Ready:
        """200 once nginx sends requests to the server, and it is warm where that is asked; else 500 and why."""
        try:
            keys = [key for _, key in named(runtime.state, server, upstream)]
        except Refused as refusal:
            raise Failed(500, refusal.code, refusal.message, refusal.remedy) from refusal
        group, now = runtime.state.groups[upstream], runtime.clock.now()
        for key in keys:
            if why := _unregistered(group, key, now):
                raise Failed(500, "not_registered", f"{upstream}: {key} {why}", "`headgate status` says more")
            if warm and (why := _cold(group, key, now)):
                raise Failed(500, "not_warm", f"{upstream}: {key} {why}", "readiness.warm in headgate.toml asks for it")
        await _served(runtime)
        return wire.Ready()


async def _served(runtime: Runtime) -> None:
    try:
        await runtime.published(PUBLISH_SECONDS)
    except (PlaneUnreachable, PlaneRefused) as error:
        remedy = error.remedy or "nginx follows as soon as it answers"
        raise Failed(500, "not_published", error.message, remedy) from error


def _unregistered(group: Group, key: str, now: float) -> str:
    """Why nginx sends the server no requests; empty when it does."""
    server, peer = next(each for each in group.upstream.servers if each.key == key), group.peers[key]
    routing = routing_of(server, peer)
    if routing is Routing.UP:
        return f"is kept away by nginx: {peer.ejected.reason}" if peer.ejected else ""
    if routing is Routing.QUARANTINE:
        last = max(peer.quarantine, key=lambda entry: entry.until)
        return f"is quarantined for {max(0.0, last.until - now):.0f} s: {last.why}"
    return _OUT.get(routing) or f"is not up: {peer.agent.down or peer.reason or 'no probe has passed yet'}"


def _cold(group: Group, key: str, now: float) -> str:
    """Why the server is not warm; empty when it is."""
    warm = group.peers[key].warm_up
    if warm.phase in (Warmth.NONE, Warmth.DONE):
        return ""
    share = warmup.share(group.upstream.policy.warm_up, warm, now)
    return f"warms up: it has {share:.0%} of its share"
