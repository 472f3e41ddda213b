from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.quantise import (
    STEPS,
    Key,
    Line,
    Pace,
    Ramp,
    Setting,
    Unsayable,
    follow,
    quantise,
    shares,
    shown,
    with_shown,
)
from controller.core.warmup import formula


def server(key: str, state: str = "up", weight: float = 1, **fields: Any) -> dict[str, Any]:
    return {"key": key, "ip": "127.0.0.1", "port": 80, "weight": weight, "state": state, "backup": False, **fields}


def ramp(epoch: int = 1, **fields: Any) -> dict[str, Any]:
    base = {"epoch": epoch, "elapsed_ms": 0, "duration_ms": 120_000, "curve": 1.0, "floor": 0.1, "held": False}
    return base | fields


def upstream(*servers: dict[str, Any], fail_open: bool = False) -> dict[str, Any]:
    return {"method": "round_robin", "fail_open": fail_open, "servers": list(servers)}


def line(*keys: str, **fields: Any) -> Line:
    return Line(f"nginx.conf:{keys}", keys, **fields)


def settings(
    servers: dict[str, Any], *lines: Line, method: str = "round_robin", **given_shares: float
) -> tuple[Setting, ...]:
    every = {each["key"]: given_shares.get(each["key"], 1.0) for each in servers["servers"]}
    return quantise(method, servers, lines, every)


def said(found: tuple[Setting, ...]) -> list[str]:
    """Each line's parameters as they are written."""
    return [
        " ".join(
            [f"weight={each.weight}"] * (each.weight is not None)
            + ["down"] * each.down
            + ["max_fails=0"] * each.survivor
        )
        for each in found
    ]


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "fail_open", "lines"),
    [
        (["up", "up", "up"], False, ["", "", ""]),
        (["up", "drain", "up"], False, ["", "down", ""]),
        (["up", "maint", "quarantine"], False, ["max_fails=0", "down", "down"]),
        (["down", "down", "up"], False, ["down", "down", "max_fails=0"]),
        (["down", "down", "down"], False, ["down", "down", "down"]),
        (["down", "down", "down"], True, ["", "", ""]),
        (["down", "drain", "drain"], True, ["max_fails=0", "down", "down"]),
        (["drain", "drain", "drain"], True, ["down", "down", "down"]),
        (["up", "waiting", "sessions"], True, ["max_fails=0", "down", "down"]),
    ],
)
def test_states_become_down_marks_and_the_last_survivor_is_guarded(
    states: list[str], fail_open: bool, lines: list[str]
) -> None:
    servers = [server(key, state) for key, state in zip("abc", states, strict=True)]
    assert said(settings(upstream(*servers, fail_open=fail_open), line("a"), line("b"), line("c"))) == lines


def test_the_only_line_of_an_upstream_needs_no_guard() -> None:
    assert said(settings(upstream(server("a")), line("a"))) == [""]


def test_a_backup_beside_the_last_primary_is_guard_enough_and_the_last_backup_is_guarded() -> None:
    lines = (line("a"), line("b", backup=True))
    assert said(settings(upstream(server("a"), server("b")), *lines)) == ["", ""]
    assert said(settings(upstream(server("a", "down"), server("b")), *lines)) == ["down", "max_fails=0"]


def test_what_the_author_marked_down_stays_down() -> None:
    assert said(settings(upstream(server("a"), server("b", "maint")), line("a"), line("b", down=True))) == [
        "max_fails=0",
        "down",
    ]


def test_a_line_that_the_table_does_not_know_does_not_serve() -> None:
    assert said(settings(upstream(server("a"), server("b")), line("a"), line("b"), line())) == ["", "", "down"]


def test_shares_become_weights_on_the_smallest_common_base() -> None:
    servers = upstream(server("a"), server("b"), server("c", weight=3))
    lines = (line("a"), line("b"), line("c", weight=3))
    assert said(settings(servers, *lines, b=0.1)) == ["weight=10", "weight=1", "weight=30"]
    assert said(settings(servers, *lines, b=0.25)) == ["weight=4", "weight=1", "weight=12"]
    assert said(settings(servers, *lines, b=0.5, c=0.5)) == ["weight=2", "weight=1", "weight=3"]


def test_weights_are_left_alone_where_all_warm_alike_or_none_does() -> None:
    servers = upstream(server("a", weight=2), server("b"))
    assert said(settings(servers, line("a", weight=2), line("b"), a=0.3, b=0.3)) == ["", ""]
    assert said(settings(upstream(server("a"), server("b", "down")), line("a"), line("b"), a=0.3)) == [
        "max_fails=0",
        "down",
    ]


def test_backups_and_primaries_have_bases_of_their_own() -> None:
    servers = upstream(server("a"), server("b"), server("x"), server("y"))
    lines = (line("a"), line("b"), line("x", backup=True), line("y", backup=True))
    assert said(settings(servers, *lines, y=0.5)) == ["", "", "weight=2", "weight=1"]


def test_a_weight_of_the_table_that_differs_from_the_line_is_said() -> None:
    servers = upstream(server("a", weight=1.5), server("b", weight=1.0))
    assert said(settings(servers, line("a"), line("b"))) == ["weight=3", "weight=2"]


def test_two_lines_of_one_address_share_its_weight_and_go_down_together() -> None:
    lines = (line("a", weight=1), line("a", weight=2), line("b"), line("a", backup=True, counted=False))
    servers = upstream(server("a", weight=3), server("b"))
    assert said(settings(servers, *lines)) == ["", "", "", ""]
    assert said(settings(servers, *lines, b=0.5)) == ["weight=2", "weight=4", "weight=1", ""]
    drained = upstream(server("a", "drain", weight=3), server("b"))
    assert said(settings(drained, *lines)) == ["down", "down", "max_fails=0", "down"]


def test_a_line_of_several_addresses_is_taken_as_a_whole_or_the_wish_is_refused() -> None:
    both = line("web@1", "web@2")
    assert said(settings(upstream(server("web@1", "drain"), server("web@2", "drain")), both)) == ["down"]
    assert said(settings(upstream(server("web@1", "down"), server("web@2")), both)) == [""]
    with pytest.raises(Unsayable, match="web@1, web@2"):
        settings(upstream(server("web@1", "drain"), server("web@2")), both)
    with pytest.raises(Unsayable, match="drain them together"):
        settings(upstream(server("web@1", "sessions"), server("web@2")), both)


@pytest.mark.parametrize("method", ["hash", "ip_hash"])
def test_a_hashed_upstream_keeps_its_weights_since_they_place_the_clients(method: str) -> None:
    servers = upstream(server("a"), server("b"), server("c", "drain"))
    assert said(settings(servers, line("a"), line("b"), line("c"), method=method, b=0.1)) == ["", "", "down"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["up", "down", "drain", "maint", "quarantine"]),
            st.integers(1, 1000),
            st.floats(0.001, 1.0),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_weights_are_whole_positive_and_in_proportion(
    drawn: list[tuple[str, int, float, bool, bool]], fail_open: bool
) -> None:
    servers = upstream(
        *(server(str(at), "maint" if down else state, weight) for at, (state, weight, _, _, down) in enumerate(drawn)),
        fail_open=fail_open,
    )
    lines = [
        line(str(at), weight=weight, backup=backup, down=down) for at, (_, weight, _, backup, down) in enumerate(drawn)
    ]
    part = {str(at): share for at, (_, _, share, _, _) in enumerate(drawn)}
    found = quantise("round_robin", servers, lines, part)
    live = [at for at, each in enumerate(found) if not each.down]
    for at, (state, _, _, _, down) in enumerate(drawn):
        assert found[at].down == (down or not (state == "up" or (fail_open and state == "down")))
        assert found[at].survivor == (live == [at] and len(drawn) > 1)
    for backup in (False, True):
        group = [at for at in live if drawn[at][3] is backup]
        weights = [drawn[at][1] if found[at].weight is None else found[at].weight for at in group]
        assert all(isinstance(weight, int) and weight >= 1 for weight in weights)
        exact = [drawn[at][1] * max(round(drawn[at][2], 2), 0.01) for at in group]
        for weight, wanted in zip(weights, exact, strict=True):
            assert weight / sum(weights) == pytest.approx(wanted / sum(exact))


# --- ramps ------------------------------------------------------------------------------------------------------------


def table(*servers: dict[str, Any]) -> dict[str, Any]:
    return {"format": 1, "revision": 1, "upstreams": {"app": upstream(*servers)}}


A: Key = ("app", "a")


@pytest.mark.parametrize(
    ("t", "share"), [(0, 0.1), (29.9, 0.1), (30, 0.25), (59.9, 0.25), (60, 0.5), (90, 0.75), (119, 0.75), (120, 1.0)]
)
def test_a_stair_has_the_formulas_share_at_its_beginning(t: float, share: float) -> None:
    ramps = follow({}, table(server("a", warm_up=ramp())), 1000.0)
    assert shares(ramps, 1000.0 + t) == {A: share}


def test_more_steps_and_a_curve_are_followed() -> None:
    started = Ramp(1, 60.0, 2.0, 0.01, False, 0.0, 0.0)
    assert started.share(30.0, 10) == 0.25
    assert started.share(29.9, 10) == pytest.approx(0.16)


def test_a_ramp_goes_on_by_its_own_clock_while_its_epoch_is_the_same() -> None:
    ramps = follow({}, table(server("a", warm_up=ramp())), 0.0)
    ramps = follow(ramps, table(server("a", warm_up=ramp(elapsed_ms=5_000))), 60.0)
    assert ramps[A].time(60.0) == 60.0
    assert shares(follow(ramps, table(server("a", warm_up=ramp(epoch=2))), 60.0), 60.0) == {A: 0.1}


def test_a_held_ramp_stands_and_goes_on_from_where_the_table_says() -> None:
    ramps = follow({}, table(server("a", warm_up=ramp(elapsed_ms=60_000, held=True))), 0.0)
    assert shares(ramps, 500.0) == {A: 0.5}
    assert with_shown(ramps, {A: 0.5})[A].next_step(500.0, STEPS) is None
    ramps = follow(ramps, table(server("a", warm_up=ramp(elapsed_ms=60_000))), 500.0)
    assert shares(ramps, 530.0) == {A: 0.75}


def test_a_held_ramp_that_steps_back_is_followed_down() -> None:
    ramps = with_shown(follow({}, table(server("a", warm_up=ramp(elapsed_ms=60_000, held=True))), 0.0), {A: 0.5})
    ramps = follow(ramps, table(server("a", warm_up=ramp(elapsed_ms=48_000, held=True))), 30.0)
    assert shares(ramps, 31.0) == {A: 0.25}
    assert ramps[A].next_step(31.0, STEPS) is None, "it comes with the table's own reload"


def test_a_ramp_goes_on_by_the_formula_of_a_new_table() -> None:
    ramps = with_shown(follow({}, table(server("a", warm_up=ramp())), 0.0), {A: 0.5})
    ramps = follow(ramps, table(server("a", warm_up=ramp(duration_ms=240_000, curve=2.0, floor=0.01))), 60.0)
    assert (ramps[A].time(60.0), ramps[A].shown) == (60.0, 0.5)
    assert shares(ramps, 60.0) == {A: 0.0625}
    assert shares(ramps, 180.0) == {A: 0.5625}


@pytest.mark.parametrize(
    ("steps", "stairs"),
    [
        pytest.param(2, [0.5, 0.5, 1.0, 1.0, 1.0], id="fewer of its own"),
        pytest.param(4, [0.25, 0.5, 0.75, 1.0, 1.0], id="as many"),
        pytest.param(16, [1 / 16, 5 / 16, 9 / 16, 13 / 16, 1.0], id="more: haproxy's"),
    ],
)
def test_a_ramp_with_steps_of_its_own_takes_at_most_those_of_the_plane(steps: int, stairs: list[float]) -> None:
    ramps = follow({}, table(server("a", warm_up=ramp(floor=1 / 16, steps=steps))), 0.0)
    assert [shares(ramps, 30.0 * at)[A] for at in range(5)] == stairs


@given(st.floats(0.1, 5), st.floats(0.01, 1), st.integers(0, 40), st.integers(1, 12), st.floats(0, 200), st.booleans())
def test_a_stair_never_gives_more_than_the_formula(
    curve: float, floor: float, own: int, plane: int, t: float, held: bool
) -> None:
    each = Ramp(1, 120.0, curve, floor, held, t if held else 0.0, 0.0, steps=own)
    assert floor <= each.share(t, plane) <= formula(t / 120.0, curve, floor, own) + 1e-9


def test_the_next_step_is_the_first_that_changes_the_share() -> None:
    started = Ramp(1, 120.0, 1.0, 0.6, False, 0.0, 0.0, shown=0.6)
    assert started.next_step(0.0, STEPS) == 90.0  # 25 and 50 % lie below the floor
    assert replace(started, shown=0.75).next_step(200.0, STEPS) == 120.0
    assert replace(started, shown=1.0).next_step(200.0, STEPS) is None


def test_a_ramp_that_the_table_ends_is_full_with_the_next_reload_and_asks_for_none_at_once() -> None:
    ramps = with_shown(follow({}, table(server("a", warm_up=ramp())), 0.0), {A: 0.75})
    ended = follow(ramps, table(server("a")), 100.0)
    assert shown(ended, 100.0) == {A: 0.75}
    assert shares(ended, 100.0) == {A: 1.0}
    assert Pace().due(False, ended, 99.0, 100.0) == 109.0
    assert follow(with_shown(ended, {A: 1.0}), table(server("a")), 110.0) == {}


def test_ramps_survive_a_file() -> None:
    ramps = with_shown(follow({}, table(server("a", warm_up=ramp())), 0.0), {A: 0.25})
    assert Ramp(**json.loads(json.dumps(asdict(ramps[A])))) == ramps[A]


# --- pace -------------------------------------------------------------------------------------------------------------


def test_a_table_waits_for_the_interval_and_nothing_else() -> None:
    pace = Pace(interval=2.0)
    assert pace.due(True, {}, last=10.0, now=10.5) == 12.0
    assert pace.due(True, {}, last=10.0, now=30.0) == 12.0
    assert pace.due(False, {}, last=10.0, now=30.0) is None


class Edge:
    """A reload plane in a pure world: tables come at known times, reloads come when the pace says."""

    def __init__(self, arrivals: dict[float, dict[str, Any]]) -> None:
        self.arrivals = sorted(arrivals.items())
        self.ramps: dict[Key, Ramp] = {}
        self.written: object = None
        self.reloads: list[float] = []

    def run(self, until: float) -> None:
        now, last, pace = 0.0, -10.0, Pace()
        current: dict[str, Any] = {"upstreams": {}}
        waiting: dict[str, Any] | None = None
        while now <= until:
            while self.arrivals and self.arrivals[0][0] <= now:
                waiting = self.arrivals.pop(0)[1]
            wanted = waiting or current
            ramps = follow(self.ramps, wanted, now)
            due = pace.due(waiting is not None, ramps, last, now)
            target = shown(ramps, now) if waiting else shares(ramps, now)
            stands = self.said(wanted, target) == self.written
            if due is not None and (stands and (waiting or due <= now)):
                self.ramps, current, waiting = with_shown(ramps, target), wanted, None
                continue
            if due is not None and due <= now:
                target = shares(ramps, now)
                self.ramps, current, waiting = with_shown(ramps, target), wanted, None
                self.written, last = self.said(wanted, target), now
                self.reloads.append(now)
                continue
            coming = [at for at in (due, self.arrivals[0][0] if self.arrivals else None) if at is not None]
            if not coming:
                return
            now = min(coming)

    def said(self, table: dict[str, Any], target: dict[Key, float]) -> list[object]:
        return [
            quantise(
                "round_robin",
                each,
                [line(s["key"]) for s in each["servers"]],
                {k: target.get((name, k), 1.0) for k in (s["key"] for s in each["servers"])},
            )
            for name, each in table["upstreams"].items()
        ]


def fleet(elapsed: dict[int, int]) -> dict[str, Any]:
    """50 cold servers, five beside a warm one in each of ten upstreams.

    `elapsed` has the seconds for which each has been up, of 120 that it warms; those that are not in it are down.
    """
    upstreams: dict[str, dict[str, Any]] = {}
    for number in range(10):
        cold = []
        for at in range(number * 5, number * 5 + 5):
            state = "up" if at in elapsed else "down"
            warming = elapsed.get(at, 120) < 120
            fields = {"warm_up": ramp(epoch=at + 1, elapsed_ms=elapsed[at] * 1000)} if warming else {}
            cold.append(server(f"s{at}", state, **fields))
        upstreams[f"app{number}"] = upstream(server(f"warm{number}"), *cold)
    return {"format": 1, "revision": 1, "upstreams": upstreams}


def test_ramps_of_fifty_servers_at_once_cost_five_reloads() -> None:
    edge = Edge({0.0: fleet(dict.fromkeys(range(50), 0)), 120.0: fleet(dict.fromkeys(range(50), 120))})
    edge.run(300.0)
    assert edge.reloads == [0.0, 30.0, 60.0, 90.0, 120.0]
    assert all(each.shown == 1.0 for each in edge.ramps.values())


def test_ramps_of_fifty_servers_that_start_one_after_another_cost_at_most_sixty_reloads() -> None:
    arrivals = {}
    for now in range(170):  # a server comes up each second; each start and each end of a ramp is a new table
        arrivals[float(now)] = fleet({at: now - at for at in range(50) if at <= now})
    edge = Edge(arrivals)
    edge.run(400.0)
    assert max(b - a for a, b in zip(edge.reloads, edge.reloads[1:], strict=False)) <= 30.0
    assert min(b - a for a, b in zip(edge.reloads, edge.reloads[1:], strict=False)) >= 2.0
    assert sum(at <= 120 for at in edge.reloads) <= 60
    assert len(edge.reloads) <= 60
    assert all(each.shown == 1.0 for each in edge.ramps.values())
