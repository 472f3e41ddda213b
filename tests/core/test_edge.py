"""Whether an edge host takes traffic, and why not."""

from __future__ import annotations

import pytest

from controller.core import edge
from controller.core.events import ConfigFailed, EdgeTold, PlaneLost
from controller.core.model import Admin, Refused, State
from tests.core.world import POLICY, A, B, C, World, upstream


def world() -> World:
    made = World().configure(upstream(), upstream(1, "api", POLICY))
    for key in (A, B, C):
        made.probe(key, times=2)
    return made


def test_an_edge_takes_traffic_while_nginx_serves_the_newest_table_and_every_upstream_serves() -> None:
    assert edge.obstacles(world().state) == []


def test_it_says_no_from_being_taken_offline_until_it_is_taken_back_and_each_is_noted_once() -> None:
    w = world()
    for _ in range(2):
        w.take(EdgeTold(True))
        assert edge.obstacles(w.state) == ["this edge is offline by `headgate edge drain`"]
    for _ in range(2):
        w.take(EdgeTold(False))
        assert edge.obstacles(w.state) == []
    assert [note.text for note in w.notes if note.kind == "edge"] == [
        "this edge goes offline: checks are answered no",
        "this edge is online again",
    ]


def test_taking_it_offline_changes_nothing_for_its_servers() -> None:
    w = world()
    before = w.state
    w.take(EdgeTold(True))
    assert (w.state.groups, w.state.revision) == (before.groups, before.revision)


def test_an_upstream_without_a_server_that_is_up_counts_though_it_fails_open() -> None:
    w = world()
    for key in (A, B, C):
        w.probe(key, ok=False, times=3)
    assert w.state.groups["app"].fail_open
    assert edge.obstacles(w.state) == ["app: 0 of 3 servers serving"]
    assert edge.obstacles(w.state, ["api"]) == []
    assert edge.obstacles(w.state, ["api", "app"]) == ["app: 0 of 3 servers serving"]
    w.probe(B, times=2)
    assert edge.obstacles(w.state) == []


def test_an_upstream_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match="nope"):
        edge.obstacles(world().state, ["nope"])


def test_an_nginx_that_is_silent_or_behind_counts() -> None:
    w = world()
    w.nginx = False
    w.admin(A, Admin.MAINT)
    assert edge.obstacles(w.state) == [
        f"nginx serves table {w.state.plane.revision}, and {w.state.revision} is the newest"
    ]
    w.take(PlaneLost("nginx does not answer"))
    assert edge.obstacles(w.state) == ["nginx does not answer"]


def test_a_configuration_that_was_never_read_counts_and_a_later_broken_one_does_not() -> None:
    assert "nginx.conf has not been read yet" in edge.obstacles(State())
    w = world()
    w.take(ConfigFailed("nginx.conf:3: odd"))
    assert edge.obstacles(w.state) == []
