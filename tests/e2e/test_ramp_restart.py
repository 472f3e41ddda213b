"""A ramp outlives nginx, whether the daemon is there or not."""

from __future__ import annotations

import asyncio
import signal

import pytest

from controller.adapters.nginx.lua import LuaPlane
from controller.demo.stage import UPSTREAM, Stage, until
from controller.ports import PeerCounters

SETTINGS = """
[upstream.app.warm_up]
starts = "first-request"
"""


def counted(stage: Stage, address: str) -> PeerCounters:
    """What nginx itself says of a server."""

    async def read() -> PeerCounters:
        async with LuaPlane(stage.prefix / "nginx.sock", stage.prefix / "table.json") as plane:
            return (await plane.counters(UPSTREAM)).upstreams[UPSTREAM][address]

    return asyncio.run(read())


def elapsed(stage: Stage, address: str) -> float:
    seen = counted(stage, address)
    assert seen.warm_epoch is not None, "it does not warm up"
    return seen.warm_elapsed


def restarts(stage: Stage) -> int:
    return sum("nginx was restarted" in event["text"] for event in stage.client.events())


@pytest.mark.timeout(180)
def test_a_restarted_nginx_goes_on_with_its_ramps_with_the_daemon_and_without() -> None:
    with Stage("sync", warm_up=3600.0, settings=SETTINGS) as stage:
        address, log = stage.addresses[0], stage.prefix / "headgate.log"
        stage.client.warm_up(UPSTREAM, address)
        load = stage.load(30)
        until(lambda: elapsed(stage, address) >= 5, "the ramp to run", 60, log)
        for times, how in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
            before = elapsed(stage, address)
            stage.restart_nginx(how)
            assert elapsed(stage, address) >= before
            until(lambda n=times: restarts(stage) == n, "the daemon to see it", 20, log)
            (shown,) = stage.client.servers(UPSTREAM, address)
            assert shown["warm_up"]["elapsed"] >= before
            until(lambda b=before: elapsed(stage, address) >= b + 1, "the ramp to go on", 20, log)
        stage.stop_daemon()
        before = elapsed(stage, address)
        stage.restart_nginx(signal.SIGKILL)
        assert elapsed(stage, address) >= before
        load.finish()
