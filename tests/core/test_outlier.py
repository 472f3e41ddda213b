"""Outliers by success rate and latency, with the peers' numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from controller.core.events import TrafficSeen
from controller.core.model import Admin, Traffic
from controller.core.policy import HealthPolicy, OutlierPolicy, WarmUpPolicy
from tests.core.world import POLICY, A, B, World, server, upstream

OUTLIERS = replace(POLICY, outlier=OutlierPolicy(), warm_up=WarmUpPolicy(duration=0), health=HealthPolicy(flaps=0))
FIVE = [f"127.0.0.1:{port}" for port in range(8001, 8006)]


class Site:
    """A world with counters that only grow."""

    def __init__(self, count: int = 5, **outlier: float) -> None:
        policy = replace(OUTLIERS, outlier=replace(OUTLIERS.outlier, **outlier))  # type: ignore[arg-type]
        self.world = World().configure(upstream(count, policy=policy))
        self.totals = {f"127.0.0.1:{8001 + at}": Traffic() for at in range(count)}
        self.keys = list(self.totals)
        for key in self.keys:
            self.world.probe(key, times=2)
        self.look()

    def serve(
        self, rates: Mapping[str, float] | None = None, means: Mapping[str, float] | None = None, answers: int = 200
    ) -> Site:
        """Ten seconds in which each server in traffic gives so many answers: that share of them good, so fast."""
        for key in set(self.world.serving()) & self.totals.keys():
            old, bad = self.totals[key], round(answers * (1 - (rates or {}).get(key, 1.0)))
            self.totals[key] = replace(
                old,
                requests=old.requests + answers,
                answered=old.answered + answers,
                errors=old.errors + bad,
                seconds=old.seconds + answers * (means or {}).get(key, 0.02),
            )
        self.world.pass_time(10)
        return self.look()

    def look(self, boot: str = "boot") -> Site:
        self.world.take(TrafficSeen("app", boot, dict(self.totals)))
        self.world.acknowledge()
        return self

    def away(self) -> list[str]:
        return [key for key in self.keys if key not in self.world.serving()]


def test_envoy_five_hosts_mean_90_threshold_52_ejects_the_one_with_50_percent() -> None:
    site = Site().serve({A: 0.5})
    assert site.away() == [A]
    assert site.world.notes[-1].text == (
        "app: 127.0.0.1:8001 is an outlier and gets nothing for 30 s: "
        "success rate 50.0 % against 100.0 % of its peers; 4 of 5 servers serving"
    )
    assert Site().serve({A: 0.5, B: 0.5}).away() == [], "one of two is 1.2 deviations off"


@pytest.mark.parametrize(
    ("site", "answers"), [(Site(4), 200), (Site(), 99), (Site(hosts=6), 200), (Site(success_rate=0), 200)]
)
def test_envoy_too_few_hosts_or_requests_tell_nothing(site: Site, answers: int) -> None:
    assert site.serve({A: 0.5}, answers=answers).away() == []


def test_tries_without_an_answer_count_as_well() -> None:
    site = Site()
    site.totals[A] = replace(site.totals[A], requests=150, failures=150, timeouts=150)
    assert site.serve().away() == [A]


def test_equals_are_not_ejected_for_a_single_bad_answer() -> None:
    assert Site().serve({A: 0.995}).away() == []
    assert Site().serve(means=dict.fromkeys(FIVE, 0.0001) | {A: 0.001}).away() == []


@pytest.mark.parametrize(("slow", "away"), [(0.09, []), (0.101, [A]), (3.0, [A])])
def test_a_mean_response_time_of_more_than_five_medians_is_an_outlier(slow: float, away: list[str]) -> None:
    site = Site().serve(means={A: slow})
    assert site.away() == away
    if away:
        assert f"mean response time {slow:.3f} s against a median of 0.020 s" in site.world.notes[-1].text


def test_latency_can_be_switched_off() -> None:
    assert Site(latency=0).serve(means={A: 3.0}).away() == []
    site = Site(latency=0, success_rate=0)
    before = site.world.state
    site.look()
    assert site.world.state is before


def test_envoy_ejections_last_longer_each_time_up_to_the_cap_and_calm_intervals_are_forgiven() -> None:
    site, lengths = Site(base=30, cap=70), []
    for _ in range(4):
        site.serve({A: 0.5})
        lengths.append(site.world.peer(A).quarantine[0].until - site.world.now)
        site.world.pass_time(lengths[-1])
        assert site.away() == []
        site.look()
    assert lengths == [30, 60, 70, 70]
    assert site.world.peer(A).ejections == 3
    site.serve().serve()
    assert site.world.peer(A).ejections == 1
    site.serve().serve()
    assert site.world.peer(A).ejections == 0


@pytest.mark.parametrize(("servers", "share", "away"), [(5, 0.1, 1), (20, 0.1, 2), (20, 0.0, 1), (20, 1.0, 3)])
def test_envoy_at_most_a_share_is_away_the_worst_first_and_one_always_may(
    servers: int, share: float, away: int
) -> None:
    site = Site(servers, max_ejected=share)
    bad = dict(zip(site.keys, (0.5, 0.4, 0.45) if servers > 5 else (0.5,), strict=False))
    site.serve(bad)
    assert site.away() == sorted(sorted(bad, key=lambda key: bad[key])[:away])
    assert len(site.serve(bad).away()) == away


def test_the_last_one_that_serves_is_never_an_outlier() -> None:
    site = Site(2, hosts=2, success_rate=0.5, latency=1.0, max_ejected=1.0)
    assert site.serve({A: 0.1}, {B: 3.0}).away() == [A], "B is slow, and all there is"


def test_who_is_drained_away_or_new_to_the_counters_is_not_compared() -> None:
    site = Site(6)
    site.world.admin(FIVE[4], Admin.MAINT)
    del site.totals[FIVE[3]]
    site.serve()
    site.totals[FIVE[3]] = Traffic()
    assert site.serve({A: 0.5}).away() == [FIVE[4]]


def test_another_nginx_counts_anew_and_gives_no_difference() -> None:
    site = Site()
    site.totals = {key: Traffic(1000, 1000, 900 if key == A else 0) for key in site.keys}
    site.world.pass_time(10)
    assert site.look("another boot").away() == []


def test_between_two_comparisons_nothing_changes() -> None:
    site = Site().serve()
    before = site.world.state
    site.world.now += 9.9
    site.look()
    assert site.world.state is before


def test_a_warming_server_is_no_outlier_for_being_slow_but_for_its_errors() -> None:
    policy = replace(OUTLIERS, warm_up=WarmUpPolicy(duration=600, starts="healthy"))
    for means, rates, away in (({A: 3.0}, {}, []), ({A: 3.0}, {A: 0.5}, [A])):
        site = Site()
        site.world.configure(replace(upstream(5, policy=policy)))
        site.world.probe(A, ok=False, times=3).probe(A, times=2)
        assert site.look().serve(rates, means).away() == away


def test_a_restart_that_is_seen_ends_it_early_and_nginx_forgets_as_well() -> None:
    site = Site().serve({A: 0.5})
    site.world.probe(A, ok=False, times=3).probe(A, times=2)
    assert site.away() == []
    assert site.world.peer(A).ejections == 0
    assert site.world.entry(A)["forgive"] == 1
    assert "app: the quarantine of 127.0.0.1:8001 ends early: it was down and is up again" in [
        note.text for note in site.world.notes
    ]


def test_an_upstream_that_is_not_managed_is_ignored() -> None:
    site = Site()
    before = site.world.state
    site.world.take(TrafficSeen("other", "boot", {server(1).key: Traffic()}))
    assert site.world.state is before
