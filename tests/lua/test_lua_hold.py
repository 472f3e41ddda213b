"""The core's ramps and those of a real nginx stay in step, while a ramp runs, holds, steps back and goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core import table
from controller.core.events import ConfigRead, Event, PeerSeen, PlaneSeen, ProbeResult, TrafficSeen
from controller.core.model import Server, State, Traffic, Upstream, Warmth
from controller.core.policy import OutlierPolicy, WarmUpPolicy
from controller.core.step import step
from tests.core.world import POLICY
from tests.lua.house import Backend, Edge, edge, eventually

RAMP = WarmUpPolicy(120.0, floor=0.5, starts="healthy", hold_latency=0.0, hold_requests=10, hold_window=1.0)


class Core:
    """The core before a real nginx, on a clock of its own."""

    def __init__(self, app: Edge) -> None:
        self.app, self.now, self.state = app, 1000.0, State()
        policy = replace(POLICY, warm_up=RAMP, outlier=OutlierPolicy(errors=0, success_rate=0.0))
        servers = tuple(Server(b.key, b.key, "127.0.0.1", b.port) for b in app.backends)
        self.take(ConfigRead((Upstream("app", servers[:1], policy=policy),)))
        self.take(ConfigRead((Upstream("app", servers, policy=policy),)))
        for _ in range(policy.health.rise):
            self.take(ProbeResult("app", servers[1].key, True, "ok"))

    def take(self, event: Event) -> None:
        self.state, _ = step(self.state, event, self.now)

    async def after(self, seconds: float) -> None:
        """So many seconds later, of which nginx knows nothing, read its counters and publish what follows."""
        self.now += seconds
        counted = (await self.app.plane.counters("app")).upstreams.get("app", {})
        self.take(
            TrafficSeen(
                "app",
                "boot",
                {key: Traffic(c.requests, c.answered, c.errors, c.failures) for key, c in counted.items()},
            )
        )
        if self.state.plane.revision < self.state.revision:
            status = await self.app.plane.publish(table.table(self.state, self.now))
            self.take(PlaneSeen("boot", status.revision))

    async def window(self, cold: Backend, seconds: float) -> Warmth:
        """A window with enough tries at both servers; the phase of the ramp after it."""
        begun = (await self.app.peer(cold)).requests
        while (await self.app.peer(cold)).requests < begun + RAMP.hold_requests:
            assert (await self.app.get())[0] == 200, "nginx tries the next server"
        await self.app.settled(cold)
        await self.after(seconds)
        return self.state.groups["app"].peers[cold.key].warm_up.phase


@pytest.mark.usefixtures("lua_nginx")
async def test_a_ramp_holds_steps_back_and_goes_on_in_nginx_as_in_the_core() -> None:
    async with edge(2) as app:
        _, cold = app.backends
        core = Core(app)
        await core.after(0)
        await core.after(0)
        assert await core.window(cold, 60.0) is Warmth.RUNNING
        assert (await app.peer(cold)).warm_elapsed < 60, "nginx goes by its own clock"

        await cold.stop()
        assert await core.window(cold, 12.0) is Warmth.HELD
        assert (await app.peer(cold)).warm_elapsed == 72.0
        assert await core.window(cold, 30.0) is Warmth.HELD
        assert (await app.peer(cold)).warm_elapsed == 60.0, "a tenth of the duration less"

        await cold.start()
        assert await core.window(cold, 5.0) is Warmth.RUNNING

        async def runs() -> bool:
            return (await app.peer(cold)).warm_elapsed > 60.0

        await eventually(runs, "the ramp goes on")
        assert (await app.peer(cold)).warm_elapsed < 72.0


@pytest.mark.usefixtures("lua_nginx")
async def test_a_restarted_nginx_goes_on_with_a_ramp_from_where_the_core_is() -> None:
    async with edge(2) as app:
        _, cold = app.backends
        core = Core(app)
        await core.after(0)
        core.now += 60.0
        app.nginx.stop()
        app.nginx.start()
        assert (await app.peer(cold)).warm_elapsed < 60, "nginx goes by its own clock"
        status = await app.plane.status()
        core.take(PlaneSeen(status.boot, status.revision))
        seen = await app.peer(cold)
        core.take(PeerSeen("app", cold.key, status.revision, 0, seen.warm_epoch, seen.warm_elapsed, True))
        await core.after(0)
        assert 60 <= (await app.peer(cold)).warm_elapsed < 72
