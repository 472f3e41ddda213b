"""What a change did, from recorded steps and seconds of traffic, in the terms of its plan."""

from __future__ import annotations

import pytest

from controller.core.outcome import LEAST, Happened, Stage, happened
from tests.core.world import A, B, C

USUAL = {A: 1 / 3, B: 1 / 3, C: 1 / 3}
EVEN = {A: 40.0, B: 40.0, C: 40.0}


def restart(server: str, since: float, back: float) -> list[Stage]:
    """The steps of one server that is away between two times."""
    return [
        Stage("find", server, since - 1, since),
        Stage("drain", server, since, since + 0.1),
        Stage("terminate", server, since + 2, since + 2.1),
        Stage("start", server, since + 3, since + 4),
        Stage("up", server, since + 4, back),
        Stage("warm", server, back, back + 5),
    ]


def traffic(seconds: int, **away: dict[int, str]) -> dict[int, dict[str, float]]:
    """120 requests a second, shared by those that are not away then."""
    out = away.get("out", {})
    found = {}
    for at in range(seconds):
        there = [key for key in USUAL if out.get(at) != key]
        found[at] = {key: 120 / len(there) for key in there}
    return found


def test_the_peak_is_the_highest_share_in_a_window_of_enough_requests() -> None:
    out = dict.fromkeys(range(10, 15), A)
    assert happened(0, 30, 3, restart(A, 10, 15), traffic(30, out=out), USUAL) == Happened(
        30, 2, pytest.approx(1.5), B, pytest.approx(120)
    )


def test_a_single_second_of_few_requests_is_no_peak() -> None:
    seen = traffic(30, out=dict.fromkeys(range(10, 15), A))
    seen[20] = {B: 20.0}
    assert happened(0, 30, 3, restart(A, 10, 15), seen, USUAL).load == pytest.approx(1.5)


def test_with_too_few_requests_while_a_server_was_away_no_peak_is_told() -> None:
    rare = {at: dict.fromkeys(USUAL, 1.0) for at in range(600)}
    found = happened(0, 600, 3, restart(A, 10, 15), rare, USUAL)
    assert (found.load, found.server) == (None, "")
    enough = {at: dict.fromkeys(USUAL, LEAST / 3 / 5) for at in range(600)}
    assert happened(0, 600, 3, restart(A, 10, 15), enough, USUAL).load == pytest.approx(1.0)


def test_a_second_without_any_traffic_counts_in_a_window() -> None:
    seen = traffic(30, out=dict.fromkeys(range(10, 15), A))
    for at in range(10, 15):
        del seen[at]
    assert happened(0, 30, 3, restart(A, 10, 15), seen, USUAL).load == pytest.approx(1.0)


def test_weights_count_and_servers_that_are_not_configured_do_not() -> None:
    usual = {A: 0.75, B: 0.25}
    found = happened(0, 5, 2, restart(A, 1, 4), {at: {B: 200.0, "gone": 1.0} for at in range(5)}, usual)
    assert (found.load, found.server) == (pytest.approx(4.0, rel=0.01), B)
    assert happened(0, 5, 2, restart(A, 1, 4), {0: {B: 200.0}}, {}).load is None


@pytest.mark.parametrize(
    ("steps", "serving"),
    [
        ([*restart(A, 10, 15), *restart(B, 16, 21)], 2),
        ([*restart(A, 10, 15), *restart(B, 12, 18)], 1),
        ([*restart(A, 10, 15), *restart(B, 15, 18)], 2),
        ([Stage("start", A, 1.0, 2.0), Stage("up", A, 2.0, 3.0)], 3),
        (restart(A, 10, 15)[:3], 2),
        ([Stage("drain", A, 1.0, 2.0), Stage("empty", A, 2.0, 30.0), Stage("drain", B, 31.0, 32.0)], 2),
        ([*restart(A, 10, 15)[:3], *restart(B, 20, 25)], 1),
        ([Stage("drain", A, None, None)], 3),
        # A, then B, and back again: B first.
        ([*restart(A, 5, 8), *restart(B, 10, 15), *restart(B, 20, 25), *restart(A, 28, 32)], 2),
        # What does not come up is away until it is rolled back and its probes pass.
        (
            [
                *restart(B, 10, 15)[:5],
                Stage("roll-back", B, 16.0, 17.0),
                Stage("up", B, 18.0, 22.0),
                *restart(A, 19, 25),
            ],
            1,
        ),
    ],
)
def test_the_least_number_that_serve_follows_from_who_was_away_at_the_same_time(
    steps: list[Stage], serving: int
) -> None:
    assert happened(0, 40, 3, steps, {}, USUAL).serving == serving


def test_a_change_that_ended_at_once_has_no_rate() -> None:
    assert happened(5.0, 5.0, 3, [], {}, USUAL) == Happened(0.0, 3, None, "", 0.0)
