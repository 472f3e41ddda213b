"""What the peers do by default, in their numbers, once our settings say the same.

Envoy's, HAProxy's, Sermant's and Dubbo's warm-ups are in core/test_warmup.py, Envoy's outliers in core/test_outlier.py
and its panic in core/test_panic.py, HAProxy's agent in core/test_agent.py, and what nginx does by itself (Ribbon's
lengths, first picks) in lua/spec/peers_spec.lua.
"""

from __future__ import annotations

import asyncio
import tomllib
from dataclasses import replace

import pytest

from controller.adapters.probe.common import Endpoint
from controller.adapters.probe.prober import GRID, _Watch
from controller.core.policy import OutlierPolicy, WarmUpPolicy
from controller.ports import Check, Pace
from controller.settings import Settings, build
from tests.core.test_outlier import Site
from tests.core.world import A, World, server, upstream

HAPROXY = "[defaults.check]\njitter = '5%'"
NGINX_PLUS = "[defaults.check]\ninterval = '5s'\nrise = 1\nfall = 1"
RIBBON = "[defaults.outlier]\nerrors = 3\ntimeouts = 3\nserver_errors = 0\nbase = '10s'\ncap = '30s'"


def read(toml: str) -> Settings:
    return build(tomllib.loads(toml), {}, "headgate.toml")


@pytest.mark.parametrize(
    ("toml", "interval", "results", "serving"),
    [
        (HAPROXY, 2, "--", True),
        (HAPROXY, 2, "--+--", True),
        (HAPROXY, 2, "---", False),
        (HAPROXY, 2, "---+", False),
        (HAPROXY, 2, "---++", True),
        (NGINX_PLUS, 5, "-", False),
        (NGINX_PLUS, 5, "-+", True),
        (NGINX_PLUS, 5, "-+-", False),
    ],
)
def test_checks_have_the_peers_interval_rise_and_fall(toml: str, interval: float, results: str, serving: bool) -> None:
    """HAProxy: inter 2s rise 2 fall 3. NGINX Plus: interval=5s fails=1 passes=1."""
    settings = read(toml)
    assert settings.check_for("app").interval == interval
    policy = replace(settings.policy_for("app"), warm_up=WarmUpPolicy(duration=0))
    world = World().configure(upstream(policy=policy))
    for key in world.serving():
        world.probe(key, times=2)
    for result in results:
        world.probe(A, result == "+")
    assert (A in world.serving()) is serving


def test_nginx_plus_mandatory_a_new_server_waits_for_its_first_pass_and_persistent_it_keeps_its_state() -> None:
    policy = replace(read(NGINX_PLUS).policy_for("app"), warm_up=WarmUpPolicy(duration=0))
    world = World().configure(upstream(2, policy=policy))
    world.configure(upstream(3, policy=policy))
    new = "127.0.0.1:8003"
    assert new not in world.serving()
    world.probe(new)
    assert new in world.serving()
    world.configure(upstream(3, policy=policy))
    assert new in world.serving()


@pytest.mark.parametrize(("jitter", "least"), [(0.02, 1.96), (0.05, 1.9)])
async def test_haproxy_spread_checks_vary_by_that_share_of_the_interval(jitter: float, least: float) -> None:
    """spread-checks 2..5, with inter 2s."""
    watch = _Watch(Endpoint.of(server(8001), Check(interval=2.0, jitter=jitter)), Pace.STEADY)
    waits = []
    for _ in range(300):
        waiting = asyncio.create_task(watch.pause())
        watch.began = asyncio.get_running_loop().time()
        await asyncio.sleep(0)
        assert watch._timer is not None
        waits.append(watch._timer.when() - watch.began)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        watch._part = 1.0
    rounding = GRID[1] / 2
    assert least - rounding <= min(waits[1:])
    assert max(waits[1:]) <= 4 - least + rounding
    assert max(waits[1:]) - min(waits[1:]) > jitter


def test_envoy_outlier_detection_has_our_defaults() -> None:
    """consecutive_5xx 5, interval 10s, base 30s, max_ejection_time 300s, max_ejection_percent 10, hosts 5, volume 100,
    stdev_factor 1900."""
    envoy = OutlierPolicy(
        server_errors=5,
        interval=10,
        base=30,
        cap=300,
        max_ejected=0.1,
        hosts=5,
        requests=100,
        success_rate=1.9,
    )
    assert read("").policy_for("app").outlier == envoy


@pytest.mark.parametrize(("failures", "seconds"), [(3, 10), (4, 20), (5, 30), (6, 30), (19, 30), (30, 30)])
def test_ribbon_backs_off_for_10_20_and_then_30_seconds(failures: int, seconds: float) -> None:
    """min(30, 10 * 2^min(n-3, 16)) after the n-th failure: with base 10 s and cap 30 s the (n-2)-th ejection."""
    assert seconds == min(30, 10 * 2 ** min(failures - 3, 16))
    ribbon = read(RIBBON).policy_for("app").outlier
    site = Site(base=ribbon.base, cap=ribbon.cap)
    for _ in range(failures - 2):
        site.serve({A: 0.5})
        length = site.world.peer(A).quarantine[0].until - site.world.now
        site.world.pass_time(length)
        site.look()
    assert length == seconds
