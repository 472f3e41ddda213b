"""The routes. They ask the runtime and put its answers and errors into the shapes of wire.py; they decide nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections.abc import AsyncIterator, Coroutine, Iterator
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Body, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.api import metrics, views, wire
from controller.api.edge import add_check, add_edge
from controller.api.face import Runtime
from controller.api.history import add_history
from controller.api.plan import add_plan, foretold
from controller.api.problems import Failed, answer_problems, problem
from controller.api.readiness import add_readiness
from controller.core.change import begin, group_of, resolve
from controller.core.events import AdminWished, ChangeWished, OfflineNoticed, OnlineNoticed, SteerWished, WarmUpWished
from controller.core.model import Admin, ChangeKind, Refused, Steer
from controller.core.notice import named
from controller.core.rollback import of_ended
from controller.ports import ConfigError, PlaneRefused, PlaneUnreachable

PUBLISH_SECONDS = 5.0
"""How long a call waits for nginx to serve what was wished."""
KEEP_ALIVE_SECONDS = 15.0
"""How long an event stream is silent before a comment shows that it lives."""
MAX_WAIT_SECONDS = 60.0
"""The longest that one call may wait for news."""
MAX_BODY = 1 << 20
"""Bytes; the longest lists of servers take a small part of it."""

_EVENT_STREAM = "text/event-stream"
_OPEN = re.compile("/healthz(/traffic)?|/readyz|/health|/readiness/.*", re.DOTALL)
_EVENT_ID = re.compile(r"[0-9]{1,18}")

_Upstream = Annotated[str, Path(description="The upstream's name in nginx.conf.")]
_Server = Annotated[str, Path(description="A server's address as written in nginx.conf; may hold `/` (unix sockets).")]
_ChangeId = Annotated[int, Path(ge=1, le=wire.MAX_ID)]
_Limit = Annotated[int, Query(ge=1, le=1000, description="At most so many.")]
_Before = Annotated[int | None, Query(ge=1, le=wire.MAX_ID, description="Only changes with a smaller id.")]
_Wait = Annotated[
    float,
    Query(ge=0, le=MAX_WAIT_SECONDS, allow_inf_nan=False, description="Seconds to wait for news of a running change."),
]
_Seen = Annotated[int, Query(ge=-1, le=wire.MAX_ID, description="The `version` that the caller has seen already.")]
_After = Annotated[int | None, Query(ge=0, le=wire.MAX_ID, description="Only events with a larger id.")]
_LastEventId = Annotated[str | None, Header(description="A broken event stream goes on after this id.")]
_ANY_ERROR: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": wire.ErrorAnswer, "description": "The request cannot be granted"},
    "5XX": {"model": wire.ErrorAnswer, "description": "Something that the daemon needs does not work"},
}


def create_app(runtime: Runtime, stopping: asyncio.Event | None = None, ready_when_warm: bool = False) -> FastAPI:
    """The whole API over this runtime. When `stopping` is set, waiting calls and event streams come to their end.

    With `ready_when_warm` /readiness says yes once a server's warm-up is over.
    """
    stop = stopping or asyncio.Event()
    app = FastAPI(
        title="Headgate",
        version=version("headgate"),
        description="Backends behind nginx come online and go offline without losing one request.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ANY_ERROR,
    )
    app.add_middleware(Bounded)
    answer_problems(app)
    add_readiness(app, runtime, ready_when_warm)
    add_check(app, runtime)
    add_edge(app, runtime)
    add_history(app, runtime)
    add_plan(app, runtime)
    scraped = metrics.registry(runtime)

    @app.get("/healthz", tags=["daemon"])
    async def healthz() -> wire.Ready:
        """200 while the daemon does its work."""
        if not runtime.alive():
            raise Failed(503, "not_alive", "the runtime task does not take events", "restart the daemon")
        return wire.Ready()

    @app.get("/readyz", tags=["daemon"])
    async def readyz() -> wire.Ready:
        """200 when nginx serves what the daemon wants; else 503 with the reasons."""
        if problems := runtime.problems():
            raise Failed(503, "not_ready", "; ".join(problems), "`headgate status` and `headgate events` say more")
        return wire.Ready()

    @app.get("/metrics", tags=["daemon"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(scraped), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/status", tags=["servers"])
    async def status() -> wire.Status:
        """Everything at a glance."""
        return views.status(runtime.state, runtime.counters, runtime.data_plane, runtime.clock.now())

    @app.get("/v1/upstreams", tags=["servers"])
    async def upstreams() -> wire.Upstreams:
        """The upstreams, those left to nginx, and what was odd in nginx.conf."""
        return views.upstreams(runtime.state, runtime.counters, runtime.config, runtime.clock.now())

    @app.get("/v1/upstreams/{upstream}", tags=["servers"])
    async def one_upstream(upstream: _Upstream) -> wire.UpstreamView:
        """One upstream with its servers."""
        group = group_of(runtime.state, upstream)
        return views.upstream(group, runtime.state, runtime.counters, runtime.clock.now())

    @app.get("/v1/upstreams/{upstream}/servers/{server:path}/in-flight", tags=["servers"])
    async def in_flight(
        upstream: _Upstream,
        server: _Server,
        revision: Annotated[int, Query(ge=0, le=wire.MAX_ID, description="Read once nginx serves this table.")] = 0,
        wait: Annotated[float, Query(ge=0, le=60, allow_inf_nan=False, description="Seconds to wait for none.")] = 0.0,
    ) -> wire.InFlight:
        """Requests in flight at a server, read from nginx now; answers when there are none, or after `wait` seconds."""
        keys = resolve(group_of(runtime.state, upstream), (server,))
        with _not_published():
            if wait:
                await _unless(stop, runtime.emptied(upstream, keys, revision, wait))
            left = await runtime.emptied(upstream, keys, revision, 0)
            if runtime.counters.revision < revision:
                raise PlaneUnreachable(f"nginx does not serve table {revision} yet", "ask again")
        return wire.InFlight(
            servers=[wire.Emptying(upstream=upstream, server=key, in_flight=count) for key, count in left.items()]
        )

    @app.get("/v1/upstreams/{upstream}/servers/{server:path}", tags=["servers"])
    async def servers(upstream: _Upstream, server: _Server) -> wire.Servers:
        """One server; for a host name, each of its addresses."""
        group = group_of(runtime.state, upstream)
        keys = resolve(group, (server,))
        found = [each for each in group.upstream.servers if each.key in keys]
        state, counters, now = runtime.state, runtime.counters, runtime.clock.now()
        return wire.Servers(
            upstream=upstream, servers=[views.server(group, each, state, counters, now) for each in found]
        )

    @app.put("/v1/upstreams/{upstream}/servers/{server:path}/admin", tags=["servers"])
    async def set_admin(upstream: _Upstream, server: _Server, wish: wire.AdminWish) -> wire.AdminAnswer:
        """Make a server ready, drain it, or put it under maintenance; answers when nginx follows it."""
        if wish.admin is Admin.DRAIN:
            keys = resolve(group_of(runtime.state, upstream), (server,))
            outcome = await runtime.wish(ChangeWished(ChangeKind.DRAIN, upstream, keys, len(keys), wish.force))
        else:
            outcome = await runtime.wish(AdminWished(upstream, server, wish.admin, wish.force))
        return wire.AdminAnswer(revision=(await _followed(runtime)).revision, change=outcome.change)

    @app.post("/v1/upstreams/{upstream}/servers/{server:path}/warm-up", tags=["servers"])
    async def warm_up(upstream: _Upstream, server: _Server) -> wire.Followed:
        """Let a server warm up anew; answers when nginx follows it."""
        await runtime.wish(WarmUpWished(upstream, server))
        return await _followed(runtime)

    @app.post("/v1/offline", tags=["notices"])
    async def offline(notice: wire.OfflineNotice) -> wire.OfflineAnswer:
        """A server goes offline: it gets no new request. Answers when nginx follows, and with `wait` when it is empty.

        Where no other server serves, an upstream keeps it (`refused`); that is an error where it is so in each.
        """
        quarantined: dict[str, tuple[str, ...]] = {}
        refusals: list[Refused] = []
        replayed = True
        for upstream, key in named(runtime.state, notice.server, notice.upstream):
            try:
                outcome = await runtime.wish(OfflineNoticed(upstream, key, notice.id, notice.seconds, notice.why))
            except Refused as refusal:
                refusals.append(refusal)
                continue
            quarantined[upstream] = (*quarantined.get(upstream, ()), key)
            replayed = replayed and outcome.replayed
        if not quarantined:
            raise refusals[0]
        revision = (await _followed(runtime)).revision

        async def emptied(seconds: float) -> list[dict[str, int]]:
            work = (runtime.emptied(upstream, keys, revision, seconds) for upstream, keys in quarantined.items())
            return await asyncio.gather(*work)

        with _not_published():
            if notice.wait:
                await _unless(stop, emptied(notice.wait))
            left = await emptied(0)
        servers = [
            wire.Emptying(upstream=upstream, server=key, in_flight=in_flight)
            for upstream, keys in zip(quarantined, left, strict=True)
            for key, in_flight in keys.items()
        ]
        return wire.OfflineAnswer(
            revision=revision,
            servers=servers,
            refused=[refusal.message for refusal in refusals],
            replayed=replayed,
            drained=not refusals and not any(each.in_flight for each in servers),
        )

    @app.post("/v1/online", tags=["notices"])
    async def online(notice: wire.OnlineNotice) -> wire.Followed:
        """A server is there again: what kept it away ends, and it is probed at once."""
        for upstream, key in named(runtime.state, notice.server, notice.upstream):
            await runtime.wish(OnlineNoticed(upstream, key))
        return await _followed(runtime)

    @app.post("/v1/config/read", tags=["daemon"])
    async def read_config(wish: wire.ConfigWish | None = None) -> wire.ConfigAnswer:
        """Read nginx.conf again now; answers when nginx follows it."""
        with _not_published():
            try:
                config = await runtime.read_config(wish.parameters() if wish else None)
            except ConfigError as error:
                raise Failed(422, "config", error.message, error.remedy) from error
            await _followed(runtime)
            await runtime.loaded()
        return wire.ConfigAnswer(revision=runtime.state.plane.revision, warnings=list(config.warnings))

    @app.post("/v1/changes", tags=["changes"], status_code=202)
    async def begin_change(wish: Annotated[wire.ChangeWish, Body()]) -> wire.ChangeBegun:
        """Begin an operation; it is recorded and goes on by itself."""
        event = wish.event(len(group_of(runtime.state, wish.upstream).upstream.servers))
        if wish.kind in (ChangeKind.SCALE_OUT, ChangeKind.SCALE_IN):
            await _see_lines(runtime, event)
        outcome = await runtime.wish(await foretold(runtime, event))
        assert outcome.change is not None, "a granted change has an id"
        return wire.ChangeBegun(change=outcome.change)

    @app.get("/v1/changes", tags=["changes"])
    async def changes(limit: _Limit = 50, before: _Before = None) -> wire.Changes:
        """The newest changes first."""
        return wire.Changes(changes=[views.change_summary(each) for each in await runtime.store.changes(limit, before)])

    @app.get("/v1/changes/{change}", tags=["changes"])
    async def one_change(change: _ChangeId, wait: _Wait = 0, seen: _Seen = -1) -> wire.ChangeView:
        """One change with its steps; with `wait`, as soon as it has ended or has news beyond `seen`."""
        deadline = runtime.clock.now() + wait
        while True:
            at = runtime.version
            record = await runtime.change(change)
            if record is None:
                raise Refused("not_found", f"there is no change {change}", "`headgate changes` lists them")
            view = views.change(record)
            left = deadline - runtime.clock.now()
            if view.version > seen or view.status.ended or left <= 0 or stop.is_set():
                return view
            await _unless(stop, runtime.changed(at, left))

    @app.post("/v1/changes/{change}/{wish}", tags=["changes"])
    async def steer_change(change: _ChangeId, wish: Steer) -> wire.Steered:
        """Pause, resume, abort or roll back a change. One that has ended is rolled back by a change of its own."""
        known = runtime.state.changes.get(change)
        record = None if known and not known.status.ended else await runtime.store.change(change)
        if wish is Steer.ROLL_BACK and record is not None:
            group = group_of(runtime.state, record.upstream)
            outcome = await runtime.wish(of_ended(change, ChangeKind(record.kind), record.steps, group))
            assert outcome.change is not None, "a granted change has an id"
            change = outcome.change
        else:
            await runtime.wish(SteerWished(change, wish))
        return wire.Steered(change=change, status=runtime.state.changes[change].status)

    @app.get(
        "/v1/events",
        tags=["events"],
        response_model=wire.Events,
        responses={200: {"content": {_EVENT_STREAM: {"schema": {"type": "string"}}}}},
    )
    async def events(
        request: Request, after: _After = None, limit: _Limit = 200, last_event_id: _LastEventId = None
    ) -> Response | wire.Events:
        """Events in order: without `after` the newest; with `Accept: text/event-stream` as they come."""
        if _EVENT_STREAM not in request.headers.get("accept", ""):
            return views.events(await runtime.store.events(after, limit))
        resumed = int(last_event_id) if last_event_id and _EVENT_ID.fullmatch(last_event_id) else after
        return StreamingResponse(
            _stream(runtime, resumed, stop), media_type=_EVENT_STREAM, headers={"Cache-Control": "no-store"}
        )

    return app


async def _see_lines(runtime: Runtime, event: ChangeWished) -> None:
    """See before anything begins that nginx.conf can be edited for this wish; Refused as the wish itself."""
    begun, outcome = begin(runtime.state, event, runtime.clock.now())
    keys = tuple(dict.fromkeys(step.server for step in begun.changes[outcome.change or 0].steps))
    coming, going = (keys, ()) if event.kind is ChangeKind.SCALE_OUT else ((), keys)
    try:
        await runtime.members.check(event.upstream, coming, going, event.weight)
    except ConfigError as error:
        raise Failed(422, "config", error.message, error.remedy) from error


class Bounded:
    """Refuses bodies that are longer than MAX_BODY, however they come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        left = MAX_BODY

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body is longer than {MAX_BODY} bytes", {"Connection": "close"})
            return message

        await self._app(scope, bounded, send)


class Guarded:
    """The app as it is served over TCP: reading only, or with a token everything for those who hold it.

    What load balancers and orchestrators probe never asks for it: /healthz and below, /readyz, /health and /readiness.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = token and f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        denied = self._denial(scope) if scope["type"] == "http" else None
        await (denied or self._app)(scope, receive, send)

    def _denial(self, scope: Scope) -> Response | None:
        if self._expected:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if _OPEN.fullmatch(scope["path"]) or hmac.compare_digest(given, self._expected):
                return None
            remedy = "send `Authorization: Bearer …` with the content of api.token_file"
            return problem(401, "unauthorized", "this needs the token", remedy, {"WWW-Authenticate": "Bearer"})
        if scope["method"] in ("GET", "HEAD"):
            return None
        return problem(
            403, "read_only", "over TCP the API only answers reads", "use the unix socket, or set api.token_file"
        )


@contextlib.contextmanager
def _not_published() -> Iterator[None]:
    try:
        yield
    except (PlaneUnreachable, PlaneRefused) as error:
        remedy = error.remedy or "the wish is recorded and nginx follows it as soon as it answers"
        raise Failed(503, "not_published", error.message, remedy) from error


async def _followed(runtime: Runtime) -> wire.Followed:
    """Wait until nginx serves everything that is decided."""
    with _not_published():
        await runtime.published(PUBLISH_SECONDS)
    return wire.Followed(revision=runtime.state.plane.revision)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Wait for the work, or for the stop; the work is cancelled then."""
    tasks = {asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in done:
        task.result()


async def _stream(runtime: Runtime, after: int | None, stop: asyncio.Event) -> AsyncIterator[str]:
    yield "retry: 1000\n\n"
    source = runtime.follow(after)
    stopped = asyncio.ensure_future(stop.wait())
    coming = asyncio.ensure_future(anext(source, None))
    try:
        while not stopped.done():
            await asyncio.wait({coming, stopped}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                yield ": still here\n\n"
            elif (record := coming.result()) is None:
                return
            else:
                # Asked for before the yield, so that there is always one task whose end ends the source.
                coming = asyncio.ensure_future(anext(source, None))
                yield f"id: {record.id}\ndata: {views.event(record).model_dump_json()}\n\n"
    finally:
        stopped.cancel()
        coming.cancel()
