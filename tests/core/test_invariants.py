"""What must hold whatever happens, in any order: hypothesis makes the histories."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import table
from controller.core.events import (
    AdminWished,
    ChangeWished,
    ConfigFailed,
    ConfigRead,
    Event,
    PeerSeen,
    PlaneLost,
    PlaneSeen,
    ProbeResult,
    StepDone,
    StepFailed,
    Ticked,
)
from controller.core.model import Admin, ChangeKind, ChangeStatus, Master, Refused, Routing, State, StepState
from controller.core.step import step
from tests.core.world import A, B, C, upstream

KEYS = st.sampled_from([A, B, C])
EVENTS = st.one_of(
    st.builds(ProbeResult, st.just("app"), KEYS, st.booleans(), st.sampled_from(["ok", "refused", "timeout"])),
    st.builds(AdminWished, st.just("app"), KEYS, st.sampled_from([Admin.READY, Admin.MAINT])),
    st.builds(
        ChangeWished,
        st.sampled_from(list(ChangeKind)),
        st.just("app"),
        st.lists(KEYS, min_size=1, max_size=3, unique=True).map(tuple),
        st.integers(1, 3),
    ),
    st.builds(PlaneSeen, st.just("boot"), st.integers(0, 40)),
    st.builds(PlaneLost, st.just("gone")),
    st.builds(PeerSeen, st.just("app"), KEYS, st.integers(0, 40), st.integers(0, 2)),
    st.builds(StepDone, st.integers(1, 3), st.integers(0, 10), st.just(""), st.just(Master(7, 1.0, "python3"))),
    st.builds(StepFailed, st.integers(1, 3), st.integers(0, 10), st.just("no")),
    st.builds(ConfigRead, st.integers(1, 3).map(lambda n: (upstream(n),))),
    st.builds(ConfigFailed, st.just("broken")),
    st.builds(Ticked),
)
HISTORIES = st.lists(st.tuples(st.floats(0, 20), EVENTS), max_size=60)


def play(state: State, history: list[tuple[float, Event]], now: float = 0.0) -> list[tuple[State, float]]:
    """Every state of a history, with its time. A wish that is refused leaves the state as it was."""
    states = []
    for wait, event in history:
        now += wait
        try:
            # A report may name a step that there is not: adapters never do that, so such events are left out.
            if isinstance(event, StepDone | StepFailed):
                change = state.changes.get(event.change)
                if change is None or event.step >= len(change.steps):
                    continue
            state, _ = step(state, event, now)
        except Refused:
            continue
        states.append((state, now))
    return states


def start() -> State:
    return play(State(), [(0.0, ConfigRead((upstream(),)))])[-1][0]


@settings(max_examples=300)
@given(HISTORIES)
def test_health_never_empties_an_upstream_and_the_wishes_of_people_always_hold(
    history: list[tuple[float, Event]],
) -> None:
    for state, now in play(start(), history):
        group = state.groups["app"]
        weights = {s.key: table.effective_weight(group, s, now) for s in group.upstream.servers}
        for server in group.upstream.servers:
            peer = group.peers[server.key]
            if peer.admin is not Admin.READY:
                assert weights[server.key] == 0, "a draining peer gets nothing, whatever the probes say"
        if any(group.peers[s.key].admin is Admin.READY for s in group.upstream.servers):
            assert any(weights.values()), "health alone never empties an upstream"
        assert group.fail_open == table.fails_open(group)


@settings(max_examples=300)
@given(HISTORIES)
def test_guards_leave_a_server_in_traffic_unless_forced(history: list[tuple[float, Event]]) -> None:
    for state, _ in play(start(), [h for h in history if not isinstance(h[1], ConfigRead)]):
        group = state.groups["app"]
        routes = {table.routing_of(s, group.peers[s.key]) for s in group.upstream.servers}
        assert routes & {Routing.UP, Routing.DOWN}, "an unforced wish never takes the last one"


@settings(max_examples=200)
@given(HISTORIES, st.integers(0, 60))
def test_replaying_the_journal_from_any_midpoint_reaches_the_same_state(
    history: list[tuple[float, Event]], middle: int
) -> None:
    whole = play(start(), history)
    first = play(start(), history[:middle])
    state, _ = first[-1] if first else (start(), 0.0)
    at = sum(wait for wait, _ in history[:middle])
    rest = play(state, history[middle:], at)
    assert (rest or first or [(start(), 0.0)])[-1][0] == (whole or [(start(), 0.0)])[-1][0]


@settings(max_examples=200)
@given(HISTORIES)
def test_revisions_only_grow_and_every_other_table_has_another_number(history: list[tuple[float, Event]]) -> None:
    before = start()
    for state, now in play(before, history):
        assert state.revision >= before.revision
        if state.revision == before.revision:
            assert _still(state, now) == _still(before, now)
        before = state


@settings(max_examples=200)
@given(HISTORIES)
def test_a_change_that_ended_has_no_open_step_and_one_server_is_in_one_change(
    history: list[tuple[float, Event]],
) -> None:
    for state, _ in play(start(), history):
        busy: list[str] = []
        for change in state.changes.values():
            if change.status is ChangeStatus.RUNNING:
                busy += {s.server for s in change.steps}
            else:
                assert not {s.state for s in change.steps} & {StepState.RUNNING, StepState.PENDING}
        assert len(busy) == len(set(busy))


def _still(state: State, now: float) -> object:
    """The table without its running clock."""
    upstreams = table.table(state, now)["upstreams"]
    assert isinstance(upstreams, dict)
    for entry in upstreams.values():
        for server in entry["servers"]:
            server.get("warm_up", {}).pop("elapsed_ms", None)
    return upstreams
