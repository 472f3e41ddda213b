"""Servers that only their probes find alive are named, whether anybody takes them out or not."""

from __future__ import annotations

import pytest

from controller.core.model import Admin, ChangeKind, Traffic
from tests.core.test_ejection import look
from tests.core.test_outlier import Site
from tests.core.world import A, B, World


def said(world: World) -> list[str]:
    return [note.text for note in world.notes if note.kind == "pseudo-dead"]


def test_a_lone_server_that_fails_all_its_traffic_is_named_once() -> None:
    site = Site(1).serve({A: 0.0}, answers=80)
    assert said(site.world) == [
        f"app: {A} is pseudo-dead: its probes pass, and 80 of 80 tries in 10 s failed; 1 of 1 servers serving"
    ]
    site.serve({A: 0.0}).serve({A: 0.2})
    assert len(said(site.world)) == 1
    site.serve().serve({A: 0.0})
    assert len(said(site.world)) == 2, "it was well in between"


def test_it_needs_no_comparison() -> None:
    site = Site(1, success_rate=0.0, latency=0.0).serve({A: 0.0}, answers=80)
    assert len(said(site.world)) == 1


@pytest.mark.parametrize(("good", "answers", "named"), [(0.5, 10, True), (0.6, 10, False), (0.0, 9, False)])
def test_half_of_ten_tries_tell(good: float, answers: int, named: bool) -> None:
    assert bool(said(Site(3).serve({B: good}, answers=answers).world)) is named


def test_tries_without_an_answer_tell_as_well() -> None:
    site = Site(3)
    site.totals[A] = Traffic(requests=40, failures=40)
    assert said(site.serve({}, answers=0).world) == [
        f"app: {A} is pseudo-dead: its probes pass, and 40 of 40 tries in 10 s failed; 3 of 3 servers serving"
    ]


def test_an_outlier_by_its_success_rate_is_named_too() -> None:
    site = Site().serve({A: 0.1})
    assert site.away() == [A]
    assert len(said(site.world)) == 1


def test_who_was_named_when_nginx_ejected_it_is_not_named_again_for_its_traffic() -> None:
    site = Site(3)
    look(site.world, A, "server_errors", 30).probe(A, times=2)
    assert len(said(site.world)) == 1
    look(site.world, A)
    site.look().serve({A: 0.0})
    assert len(said(site.world)) == 1
    look(site.world, A, "server_errors", 60, times=2).probe(A, times=2)
    assert len(said(site.world)) == 1


def test_another_process_is_named_again() -> None:
    site = Site(3).serve({A: 0.0})
    site.world.wish(ChangeKind.RESTART, A)
    site.world.live(20)
    site.look().serve({A: 0.0})
    assert len(said(site.world)) == 2


def test_who_is_down_or_leaves_is_not_named() -> None:
    site = Site(3)
    site.world.probe(A, ok=False, times=3)
    site.totals[A] = Traffic(requests=40, failures=40)
    site.world.admin(B, Admin.DRAIN)
    site.totals[B] = Traffic(requests=40, answered=40, errors=40)
    assert said(site.serve({}, answers=0).world) == []
