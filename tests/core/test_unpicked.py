"""A server that is up and warms up, and that nginx never picks, is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core.events import ConfigRead, TrafficSeen
from controller.core.model import Ejection, Traffic, Upstream
from controller.core.policy import BalancePolicy, Policy, StickyPolicy, WarmUpPolicy
from tests.core.world import POLICY, A, B, C, World, server, upstream

RAMP = replace(POLICY, warm_up=WarmUpPolicy(duration=1000.0, floor=0.1, starts="first-request"))


class Site:
    """C has come to A and B, and waits for its first request at a tenth of its weight: one pick in 21 is its share."""

    def __init__(self, policy: Policy = RAMP, **fields: bool) -> None:
        self.world = World()
        known = (server(8001), server(8002))
        self.world.configure(Upstream("app", known, policy=policy)).probe(A, times=2).probe(B, times=2)
        self.world.take(ConfigRead((Upstream("app", (*known, server(8003, **fields)), policy=policy),)))
        self.world.probe(C, times=2)
        self.requests, self.boot = 0, "boot"

    def picks(self, count: int, picked: bool = False, epoch: int | None = None, **fields: Ejection) -> Site:
        self.requests += count
        warm = self.world.peer(C).warm_up.epoch if epoch is None else epoch
        mine = Traffic(epoch=warm, picked=picked, **fields)
        self.world.take(TrafficSeen("app", self.boot, {A: Traffic(self.requests), B: Traffic(), C: mine}))
        return self

    def said(self) -> list[str]:
        return [note.text for note in self.world.notes if "never picked" in note.text]


def test_a_server_that_is_up_and_was_not_picked_in_time_is_named_once() -> None:
    site = Site().picks(1000).picks(20)
    assert site.said() == []
    assert site.picks(1).said() == [
        f"app: {C} is up and warms up, but was never picked in 21 requests; it was due in 21"
    ]
    assert len(site.picks(500).said()) == 1
    assert site.picks(1, picked=True).world.state.groups["app"].unpicked == {}


def test_who_was_picked_is_not_named() -> None:
    assert Site().picks(0).picks(500, picked=True).said() == []


def test_another_nginx_and_another_warm_up_count_anew() -> None:
    site = Site().picks(0).picks(20)
    site.boot = "another"
    assert site.picks(20).said() == []
    assert site.picks(15).said() == []
    assert site.picks(400, epoch=99).said() == [], "nginx does not know this warm-up yet"
    assert site.picks(20).said() == []
    assert len(site.picks(21).said()) == 1


def test_who_is_ejected_is_not_waited_for() -> None:
    site = Site().picks(0)
    site.picks(500, ejected=Ejection(site.world.now + 30, "errors", 1))
    assert site.said() == []


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        (replace(RAMP, sticky=StickyPolicy("route")), {}),
        (replace(RAMP, balance=BalancePolicy("hash", "$uri", bound=1.5)), {}),
        (RAMP, {"backup": True}),
    ],
    ids=["sticky", "hash", "backup"],
)
def test_where_nginx_promises_nothing_nobody_is_named(policy: Policy, fields: dict[str, bool]) -> None:
    assert Site(policy, **fields).picks(0).picks(500).said() == []


def test_two_that_wait_may_each_cost_the_other_a_pick() -> None:
    site = Site(replace(RAMP, warm_up=replace(RAMP.warm_up, max_cold=1.0)))
    four = upstream(4, policy=site.world.state.groups["app"].upstream.policy)
    site.world.take(ConfigRead((four,)))
    other = "127.0.0.1:8004"
    site.world.probe(other, times=2)
    epochs = {key: site.world.peer(key).warm_up.epoch for key in (C, other)}
    for requests in (0, 22, 23):  # one in 22 is the share of each
        seen = {A: Traffic(requests), B: Traffic()} | {key: Traffic(epoch=each) for key, each in epochs.items()}
        site.world.take(TrafficSeen("app", "boot", seen))
        assert len(site.said()) == (2 if requests == 23 else 0)
