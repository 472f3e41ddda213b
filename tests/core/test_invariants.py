"""What must hold whatever happens, in any order: hypothesis makes the histories."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import table
from controller.core.events import (
    AdminWished,
    AgentSaid,
    ChangeWished,
    ConfigFailed,
    ConfigRead,
    Event,
    OfflineNoticed,
    PeerSeen,
    PlaneLost,
    PlaneSeen,
    ProbeResult,
    Restored,
    SteerWished,
    StepDone,
    StepFailed,
    Ticked,
    TrafficSeen,
    WarmUpWished,
)
from controller.core.model import (
    Admin,
    ChangeKind,
    ChangeStatus,
    Ejection,
    Master,
    Peer,
    Refused,
    Routing,
    State,
    Steer,
    StepState,
    Traffic,
    Warmth,
)
from controller.core.policy import HealthPolicy, OutlierPolicy, Policy, WarmUpPolicy
from controller.core.step import step
from tests.core.world import POLICY, A, B, C, upstream

KEYS = st.sampled_from([A, B, C])
JUDGING = replace(
    POLICY,
    health=HealthPolicy(rise=1, fall=1, flaps=1, flap_hold=20, panic=0.5),
    outlier=OutlierPolicy(interval=1, hosts=2, requests=1, success_rate=0.5, latency=1.5, max_ejected=1.0),
)
SUSPECTING = replace(POLICY, health=HealthPolicy(detector="accrual", phi=2))
WORDS = st.sampled_from(["75% up", "0%", "100% ready up maxconn:5", "drain", "maint", "down#load", "up ready", "what"])
COUNTERS = st.tuples(st.integers(0, 50), st.integers(0, 9), st.sampled_from(["errors", "mark", "", "", ""]))
EVENTS = st.one_of(
    st.builds(ProbeResult, st.just("app"), KEYS, st.booleans(), st.sampled_from(["ok", "refused", "timeout"])),
    st.builds(AdminWished, st.just("app"), KEYS, st.sampled_from([Admin.READY, Admin.MAINT])),
    st.builds(
        ChangeWished,
        st.sampled_from(list(ChangeKind)),
        st.just("app"),
        st.lists(KEYS, min_size=1, max_size=3, unique=True).map(tuple),
        st.integers(1, 3),
        max_unavailable=st.integers(0, 2),
        workers=st.integers(1, 3),
        queue=st.booleans(),
    ),
    st.builds(SteerWished, st.integers(1, 4), st.sampled_from(list(Steer))),
    st.builds(AgentSaid, st.just("app"), KEYS, WORDS),
    st.dictionaries(KEYS, COUNTERS, min_size=1),
    st.builds(PlaneSeen, st.just("boot"), st.integers(0, 40)),
    st.builds(PlaneLost, st.just("gone")),
    st.builds(PeerSeen, st.just("app"), KEYS, st.integers(0, 40), st.integers(0, 2)),
    st.builds(StepDone, st.integers(1, 3), st.integers(0, 10), st.just(""), st.just(Master(7, 1.0, "python3"))),
    st.builds(StepFailed, st.integers(1, 3), st.integers(0, 10), st.just("no")),
    st.builds(
        lambda n, policy: ConfigRead((upstream(n, policy=policy),)),
        st.integers(1, 3),
        st.sampled_from([POLICY, JUDGING, JUDGING, SUSPECTING]),
    ),
    st.builds(WarmUpWished, st.just("app"), KEYS),
    st.builds(OfflineNoticed, st.just("app"), KEYS, st.just(""), st.floats(0, 30)),
    st.builds(ConfigFailed, st.just("broken")),
    st.builds(Ticked),
)
NARROW = replace(
    POLICY, warm_up=WarmUpPolicy(duration=10.0, starts="healthy", max_cold=0.01, hold_window=1.0, step_back=5.0)
)
BUSY = [
    TrafficSeen("app", "boot", {key: Traffic(n, n, n * (key == B), seconds=n * (key == C)) for key in (A, B, C)})
    for n in (0, 200, 400, 800)
]
OFF = replace(POLICY, warm_up=WarmUpPolicy(duration=0.0))
RAMPING = {Warmth.WAITING, Warmth.RUNNING, Warmth.HELD}
Counted = dict[str, tuple[int, int, str]]
HISTORIES = st.lists(st.tuples(st.floats(0, 20), EVENTS), max_size=60)
JUDGEMENTS = st.one_of(
    st.builds(ProbeResult, st.just("app"), KEYS, st.booleans(), st.just("timeout")),
    st.dictionaries(KEYS, COUNTERS, min_size=1),
    st.builds(AgentSaid, st.just("app"), KEYS, WORDS),
    st.builds(AdminWished, st.just("app"), KEYS, st.sampled_from([Admin.READY, Admin.MAINT])),
)
JUDGED = st.lists(st.tuples(st.floats(0, 20), JUDGEMENTS), min_size=10, max_size=100)

# What warm-ups are made of: servers that go and come, traffic that is good or bad, and time.
WARM_UPS = st.lists(
    st.one_of(
        KEYS.map(lambda key: [(0.0, ProbeResult("app", key, False, "refused"))] * 3),
        KEYS.map(lambda key: [(0.0, ProbeResult("app", key, True, "ok"))] * 2),
        KEYS.map(lambda key: [(0.0, WarmUpWished("app", key))]),
        KEYS.map(lambda key: [(0.0, OfflineNoticed("app", key, seconds=1.0)), (1.0, Ticked())]),
        st.lists(st.floats(0, 6), max_size=4).map(lambda waits: list(zip(waits, BUSY, strict=False))),
        st.floats(0, 6).map(lambda wait: [(wait, Ticked())]),
        st.sampled_from([POLICY, NARROW, OFF]).map(lambda policy: [(0.0, ConfigRead((upstream(policy=policy),)))]),
    ),
    max_size=25,
).map(lambda bursts: [(0.0, ConfigRead((upstream(policy=NARROW),))), *(event for burst in bursts for event in burst)])


def play(state: State, history: list[tuple[float, Event | Counted]], now: float = 0.0) -> list[tuple[State, float]]:
    """Every state of a history, with its time. A wish that is refused leaves the state as it was."""
    states = []
    for wait, happened in history:
        now += wait
        if isinstance(happened, dict):  # it is read from an nginx that serves the newest table
            state, _ = step(state, PlaneSeen("boot", state.revision), now)
        event = _seen(happened, now) if isinstance(happened, dict) else happened
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


def start(policy: Policy = POLICY) -> State:
    return play(State(), [(0.0, ConfigRead((upstream(policy=policy),)))])[-1][0]


@settings(max_examples=300)
@given(HISTORIES | WARM_UPS)
def test_health_never_empties_an_upstream_and_the_wishes_of_people_always_hold(
    history: list[tuple[float, Event | Counted]],
) -> None:
    for state, now in play(start(), history):
        assert_nobody_is_forgotten(state, now)


@settings(max_examples=300)
@given(JUDGED)
def test_nor_do_flapping_outliers_ejections_and_agents(history: list[tuple[float, Event | Counted]]) -> None:
    for state, now in play(start(JUDGING), history):
        assert_nobody_is_forgotten(state, now)


@settings(max_examples=300)
@given(HISTORIES)
def test_guards_leave_a_server_in_traffic_unless_forced(history: list[tuple[float, Event | Counted]]) -> None:
    for state, _ in play(start(), [h for h in history if not isinstance(h[1], ConfigRead | AgentSaid | dict)]):
        group = state.groups["app"]
        routes = {table.routing_of(s, group.peers[s.key]) for s in group.upstream.servers}
        assert routes & {Routing.UP, Routing.DOWN}, "an unforced wish never takes the last one"


@settings(max_examples=300)
@given(WARM_UPS)
def test_a_server_waits_for_its_turn_only_while_a_warm_one_serves_and_another_warms_up(
    history: list[tuple[float, Event | Counted]],
) -> None:
    for state, _ in play(start(), history):
        group = state.groups["app"]
        routes = {s.key: table.routing_of(s, group.peers[s.key]) for s in group.upstream.servers}
        phases = {key: peer.warm_up.phase for key, peer in group.peers.items()}
        if Routing.WAITING in routes.values():
            serving = {phases[key] for key, routing in routes.items() if routing is Routing.UP}
            assert serving & {Warmth.NONE, Warmth.DONE}
            assert serving & RAMPING
        else:
            assert Warmth.QUEUED not in phases.values(), "who gets no traffic waits for no turn"


@settings(max_examples=200)
@given(WARM_UPS)
def test_a_daemon_that_is_restarted_at_any_midpoint_has_the_same_ramps(
    history: list[tuple[float, Event | Counted]],
) -> None:
    for state, now in play(start(), history):
        group = state.groups["app"]
        peers = {("app", key): peer for key, peer in group.peers.items()}
        again, _ = step(State(), Restored(state.revision, 1, state.next_epoch, peers, {}, away=3.0), now + 3)
        again, _ = step(again, ConfigRead((group.upstream,)), now + 3)
        assert table.table(again, now + 3)["upstreams"] == table.table(state, now + 3)["upstreams"]


@settings(max_examples=200)
@given(HISTORIES, st.integers(0, 60))
def test_replaying_the_journal_from_any_midpoint_reaches_the_same_state(
    history: list[tuple[float, Event | Counted]], middle: int
) -> None:
    whole = play(start(), history)
    first = play(start(), history[:middle])
    state, _ = first[-1] if first else (start(), 0.0)
    at = sum(wait for wait, _ in history[:middle])
    rest = play(state, history[middle:], at)
    assert (rest or first or [(start(), 0.0)])[-1][0] == (whole or [(start(), 0.0)])[-1][0]


@settings(max_examples=200)
@given(HISTORIES | WARM_UPS)
def test_revisions_only_grow_and_every_other_table_has_another_number(
    history: list[tuple[float, Event | Counted]],
) -> None:
    before = start()
    for state, now in play(before, history):
        assert state.revision >= before.revision
        if state.revision == before.revision:
            assert _still(state, now) == _still(before, now)
        before = state


@settings(max_examples=200)
@given(HISTORIES)
def test_a_change_that_ended_has_no_open_step_and_one_server_is_in_one_change(
    history: list[tuple[float, Event | Counted]],
) -> None:
    for state, _ in play(start(), history):
        busy: list[str] = []
        for change in state.changes.values():
            if change.status is ChangeStatus.QUEUED:
                assert {s.state for s in change.steps} == {StepState.PENDING}
            elif not change.status.ended:
                busy += {s.server for s in change.steps}
            else:
                assert not {s.state for s in change.steps} & {StepState.RUNNING, StepState.PENDING}
        assert len(busy) == len(set(busy))


def assert_nobody_is_forgotten(state: State, now: float) -> None:
    group = state.groups["app"]
    weights = table.effective_weights(group, now)
    for server in group.upstream.servers:
        peer = group.peers[server.key]
        assert 0 <= weights[server.key] <= server.weight * max(1, peer.agent.weight)
        if table.routing_of(server, peer) is Routing.UP and not peer.ejected:
            assert weights[server.key] > 0
        if peer.admin is not Admin.READY:
            assert weights[server.key] == 0, "a draining peer gets nothing, whatever probes, agent and traffic say"
    if any(wanted(peer) for peer in group.peers.values()):
        assert any(weights.values()), "health, flapping and outliers alone never empty an upstream"
    assert group.tally == table.tally(group)
    assert group.fail_open == table.fails_open(group)


def wanted(peer: Peer) -> bool:
    """Whether people and the server itself want it to serve."""
    ready = peer.admin is Admin.READY and peer.agent.admin is Admin.READY and peer.agent.weight > 0
    return ready and all(entry.kind in ("flapping", "outlier") for entry in peer.quarantine)


def _seen(counted: Counted, now: float) -> TrafficSeen:
    """nginx's counters, which go on from where the time stands."""
    return TrafficSeen(
        "app",
        "boot",
        {
            key: Traffic(
                int(now) * 100 + requests,
                answered=int(now) * 100 + requests,
                errors=int(now) * errors,
                seconds=now * errors,
                ejected=Ejection(now + 9, reason, 1) if reason else None,
            )
            for key, (requests, errors, reason) in counted.items()
        },
    )


def _still(state: State, now: float) -> object:
    """The table without its running clock."""
    upstreams = table.table(state, now)["upstreams"]
    assert isinstance(upstreams, dict)
    for entry in upstreams.values():
        for server in entry["servers"]:
            server.get("warm_up", {}).pop("elapsed_ms", None)
    return upstreams
