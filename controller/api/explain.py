"""Why a server gets what it gets: questions that operators ask, answered in sentences from state and records.

Values in, sentences out. Every sentence rests on something that was recorded or is configured, and says when or which.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from controller.core import cold, ejection, table, unpicked, warmup
from controller.core.model import Admin, Group, Health, Peer, Routing, Server, State, Warmth
from controller.ports import ChangeRecord, Counters, EventRecord, PeerCounters, StepRecord, TrafficRecord

_SMEAR = 2.0  # seconds over which a request may be spread in the records, and in which nginx takes a table
_NOTHING = PeerCounters(0, 0, 0)
_BEGAN = " warms up over "
_NAMED = 3  # stages of a change that are named, the longest first
_STAGES = {
    "before_drain": "the hooks of [upstream.*.hooks] ran",
    "drain": "until nginx served the table without it",
    "notify": "until the consumers had acknowledged, or notices.deadline",
    "sessions": "sessions by cookie were left to it, up to sticky.drain",
    "empty": "requests that had begun before were still under way, up to drain.timeout",
    "after_drain": "the hooks of [upstream.*.hooks] ran",
    "settle": "the wait after deregistration, drain.settle",
    "exit": "its process finished what it had, up to process.graceful_timeout and margin",
    "start": "until the new process listened",
    "up": "until the probes called it up: check.rise passes, check.interval apart",
    "after_up": "the hooks of [upstream.*.hooks] ran",
    "warm": "until it was warm, which takes warm_up.duration; the next batch waits for that",
    "hold": "the minimum ready time, rollout.ready_time",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of one server: the state at `now` (`wall`: seconds since the epoch), its events in order, its
    newest change, its traffic second by second, and the requests a second of the whole upstream in its warm-up."""

    state: State
    group: Group
    key: str
    counters: Counters
    data_plane: str
    now: float
    wall: float
    events: tuple[EventRecord, ...] = ()
    change: ChangeRecord | None = None
    traffic: tuple[TrafficRecord, ...] = ()
    rate: float = 0.0

    @property
    def name(self) -> str:
        """The upstream's name."""
        return self.group.upstream.name

    @property
    def server(self) -> Server:
        """The server as configured."""
        return next(each for each in self.group.upstream.servers if each.key == self.key)

    @property
    def peer(self) -> Peer:
        """Its living side."""
        return self.group.peers[self.key]

    @property
    def weights(self) -> dict[str, float]:
        """What the balancer reckons with, by server."""
        return table.effective_weights(self.group, self.now)

    @property
    def counted(self) -> PeerCounters:
        """What nginx counted of it."""
        return self.counters.upstreams.get(self.name, {}).get(self.key, _NOTHING)

    def newest(self, *kinds: str, saying: str = "") -> EventRecord | None:
        """The newest event of this server that is of one of these kinds and says this."""
        mine = (each for each in reversed(self.events) if each.server == self.key and each.kind in kinds)
        return next((each for each in mine if saying in each.text), None)


def warmed(facts: Facts) -> tuple[int, int] | None:
    """From when to when its last warm-up ran by its duration, in whole seconds since the epoch; None: none recorded."""
    duration = int(facts.group.upstream.policy.warm_up.duration)
    if (begun := facts.newest("warm-up", saying=_BEGAN)) is None or duration < 1:
        return None
    return int(begun.at), int(begun.at) + duration


def explain(facts: Facts) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each question with its sentences; a question that does not arise is left out."""
    yield "Does it get traffic now?", tuple(_now(facts))
    if not facts.weights[facts.key]:
        yield "Does traffic still reach it, and why?", tuple(_still(facts))
    yield "Why did its warm-up begin when it did?", tuple(_begin(facts))
    if ramp := tuple(_ramp(facts)):
        yield "Why is the curve not gradual?", ramp
    if facts.change:
        yield "Why did its last change take so long?", tuple(_release(facts, facts.change))


# --- does it get traffic ------------------------------------------------------------------------------------------


def _now(facts: Facts) -> Iterator[str]:
    server, peer, weights = facts.server, facts.peer, facts.weights
    mine = weights[facts.key]
    if not mine:
        yield f"No new request goes to it: {_why_not(facts)}."
    elif server.backup:
        yield "It is a backup: it gets requests only while no primary server does."
    else:
        backups = {each.key for each in facts.group.upstream.servers if each.backup}
        total = sum(weight for key, weight in weights.items() if key not in backups)
        yield f"It gets {mine / total:.0%} of the new requests: its weight now is {mine:.3g} of {total:.3g} in all."
    if mine and warmup.ramping(peer.warm_up):
        share = warmup.share(facts.group.upstream.policy.warm_up, peer.warm_up, facts.now)
        yield f"It warms up, and has {share:.0%} of its full weight."
        if _unpicked(facts):
            due = unpicked.first_pick(facts.group, weights, facts.key)
            yield f"In this warm-up nginx has not picked it yet; by its weight its first request is due in {due}."
    if mine and peer.agent.weight != 1:
        yield f"Its agent asks for {peer.agent.weight:.0%} of its weight."
    if mine and facts.group.fail_open:
        yield "Too few servers of the upstream are up, so health is ignored and those that are down serve as well."
    if problem := _behind(facts):
        yield problem


def _unpicked(facts: Facts) -> bool:
    counted = facts.counted
    known = facts.data_plane == "lua" and counted.warm_epoch == facts.peer.warm_up.epoch
    return known and not counted.warm_picked and unpicked.promised(facts.group, facts.server)


def _why_not(facts: Facts) -> str:
    server, peer = facts.server, facts.peer
    match table.routing_of(server, peer):
        case Routing.MAINT if server.down:
            why = f"nginx.conf marks it down{f' ({server.place})' if server.place else ''}"
        case Routing.MAINT if peer.admin is Admin.MAINT:
            why = "it is under maintenance"
        case Routing.DRAIN if peer.held:
            why = f"change {peer.held} of another upstream handles its process, and has not given it back"
        case Routing.DRAIN | Routing.SESSIONS if peer.admin is Admin.DRAIN:
            why = "it drains"
        case Routing.MAINT | Routing.DRAIN:
            why = "its agent says so"
        case Routing.WAITING:
            why = "it waits for its turn to warm up, for as much of the upstream is cold as warm_up.max_cold allows"
        case _ if peer.quarantine:
            entry = peer.quarantine[-1]
            why = f"it is kept away for {max(0.0, entry.until - facts.now):.0f} s more ({entry.kind}): {entry.why}"
        case _ if peer.agent.down:
            why = f"its agent says that it is down ({peer.agent.down})"
        case Routing.DOWN:
            known = f" ({peer.reason})" if peer.reason else ""
            why = f"its probes fail{known}" if peer.health is Health.DOWN else "no probe has passed yet"
        case _:
            why = "it has no weight"
            if peer.ejected:
                cause = ejection.reason(peer.ejected, facts.group.upstream.policy.outlier)
                why = f"nginx keeps it away for {max(0.0, peer.ejected.until - facts.now):.0f} s more after {cause}"
    since = _offline(facts)
    return f"{why}, since {_clock(since, facts)}" if since else why


def _behind(facts: Facts) -> str:
    plane, revision = facts.state.plane, facts.state.revision
    if plane.trouble:
        return f"nginx still serves table {plane.revision}, and {revision} is wanted: {plane.trouble}."
    if plane.revision < revision:
        return f"nginx still serves table {plane.revision}, and {revision} is wanted: it is on its way."
    return ""


def _offline(facts: Facts) -> float | None:
    """Since when no new request goes to it, as recorded."""
    peer = facts.peer
    if peer.held or peer.admin is not Admin.READY:
        admin = facts.newest("admin")
        drains = [each for each in _stages(facts) if each.name == "drain"]
        times = [admin.at if admin else None, *(each.ended_at or each.started_at for each in drains)]
        return max((at for at in times if at is not None), default=None)
    kinds = ("quarantine", "flapping", "outlier") if peer.quarantine else ("ejection",) if peer.ejected else ("health",)
    found = facts.newest(*kinds, *(("agent",) if peer.agent.down else ()))
    return found.at if found else None


def _still(facts: Facts) -> Iterator[str]:
    peer, counted, since = facts.peer, facts.counted, _offline(facts)
    said = False
    if problem := _behind(facts):
        yield f"{problem} Until then new requests may reach it."
        said = True
    if counted.in_flight:
        limit = facts.group.upstream.policy.drain.timeout
        yield (
            f"{counted.in_flight} requests that began before are still under way; a drain gives them {limit:g} s"
            " (drain.timeout)."
        )
        said = True
    if native := facts.counters.native.get(facts.name, 0):
        yield f"{native} requests from before nginx had this table are still under way; nobody knows at which server."
        said = True
    if table.routing_of(facts.server, peer) is Routing.SESSIONS:
        sticky = facts.group.upstream.policy.sticky
        yield (
            f"It keeps the sessions that the cookie {sticky.cookie} binds to it for up to {sticky.drain:g} s"
            f" (sticky.drain), or until none asked for {sticky.idle:g} s."
        )
        said = True
    for other in _elsewhere(facts):
        yield f"The same address is a server of the upstream {other}, too, and serves there."
        said = True
    if since is not None:
        later = [row for row in facts.traffic if row.at > since + _SMEAR and row.requests]
        if later:
            total = round(sum(row.requests for row in later))
            yield (
                f"nginx has sent it {total:,} requests since it went offline at {_clock(since, facts)}, the last at"
                f" {_clock(later[-1].at, facts)}."
            )
            said = True
        else:
            yield f"nginx has sent it no new request since {_clock(since, facts)}."
    if not said:
        yield "None is under way. What reaches it all the same does not come through this nginx and this upstream."
    if peer.admin is not Admin.MAINT and not facts.server.down:
        yield "Headgate's probes go on, and stand in its access log; they are not counted as traffic."


def _elsewhere(facts: Facts) -> Iterator[str]:
    mine = (facts.server.ip, facts.server.port)
    for name, group in facts.state.groups.items():
        if name != facts.name and any((each.ip, each.port) == mine for each in group.upstream.servers):
            weights = table.effective_weights(group, facts.now)
            if any(weights[each.key] for each in group.upstream.servers if (each.ip, each.port) == mine):
                yield name


# --- its warm-up --------------------------------------------------------------------------------------------------


def _begin(facts: Facts) -> Iterator[str]:
    warm, policy = facts.peer.warm_up, facts.group.upstream.policy.warm_up
    if policy.duration <= 0:
        yield "It has none: warm_up.duration is 0."
        return
    if cold.needless(facts.group, facts.server):
        yield "It has none: no other server could take what it would leave."
        return
    if warm.phase is Warmth.QUEUED:
        yield f"It has not begun ({warm.cause}): as much of the upstream is cold as warm_up.max_cold allows."
        return
    begun = facts.newest("warm-up", saying=_BEGAN)
    if begun is None or not warm.epoch:
        yield "None is recorded: nginx was sending to it before Headgate knew it, so it counted as warm."
        return
    yield f"At {_clock(begun.at, facts)} was recorded: {begun.text}."
    up = facts.newest("health", saying=" is up")
    if up and up.at <= begun.at + _SMEAR:
        rise = facts.group.upstream.policy.health.rise
        yield f"It was called up at {_clock(up.at, facts)}, after {rise} good probes in a row (check.rise)."
    if policy.starts == "healthy":
        yield 'The ramp runs from there, for warm_up.starts is "healthy".'
        return
    ignored = f", other than for {', '.join(policy.ignore_paths)}" if policy.ignore_paths else ""
    if warm.phase is Warmth.WAITING:
        yield f"The ramp has not begun to run: no request has come{ignored} (warm_up.starts)."
        return
    first = next((row.at for row in facts.traffic if row.at >= int(begun.at) and row.requests), None)
    if first is not None:
        at = _clock(first, facts)
        yield f"The ramp runs from the first request on{ignored} (warm_up.starts); the first came at {at}."


def _ramp(facts: Facts) -> Iterator[str]:
    warm, policy, upstream = facts.peer.warm_up, facts.group.upstream.policy.warm_up, facts.group.upstream
    begun = facts.newest("warm-up", saying=_BEGAN)
    if begun is None or not warm.epoch or policy.duration <= 0:
        return
    bent = [
        each for each in facts.events if each.id > begun.id and each.kind == "warm-up" and " is warm" not in each.text
    ]
    for event in bent:
        yield f"At {_clock(event.at, facts)} was recorded: {event.text}."
    if not bent:
        yield "Nothing is recorded that held it or made it jump."
    half = warmup.formula(0.5, policy.curve, policy.floor, policy.steps)
    yield (
        f"As configured it begins with {warmup.formula(0.0, policy.curve, policy.floor, policy.steps):.0%}, has"
        f" {half:.0%} after {policy.duration / 2:g} s and all after {policy.duration:g} s (floor {policy.floor:.0%},"
        f" curve {policy.curve:g})."
    )
    if policy.steps:
        yield f"It goes up in {policy.steps} stairs of {policy.duration / policy.steps:g} s (warm_up.steps)."
    if facts.data_plane == "reload":
        yield "On the reload plane weights are whole numbers and change with reloads, so the curve has stairs."
    method = table.method_of(upstream)
    if method not in ("round_robin", "random"):
        yield f"The method {method} chooses by more than the weight, so the share follows it only roughly."
    if upstream.policy.sticky.cookie:
        yield "Requests of a session go where its cookie says, whatever the weights."
    few = facts.rate * policy.floor * facts.server.weight / (sum(each.weight for each in upstream.servers) or 1)
    if 0 < few < 1:
        yield (
            f"The upstream had {facts.rate:.1f} requests a second: at its beginning the ramp was one request in"
            f" {1 / few:.0f} s, so the line consists of single requests."
        )


# --- its last change ----------------------------------------------------------------------------------------------


def _stages(facts: Facts) -> tuple[StepRecord, ...]:
    return tuple(each for each in facts.change.steps if each.server == facts.key) if facts.change else ()


def _release(facts: Facts, change: ChangeRecord) -> Iterator[str]:
    what = f"Change {change.id} ({change.kind})"
    end = change.ended_at or facts.wall
    state = f"took {end - change.created_at:.1f} s" if change.ended_at else "runs"
    batches = 1 + max((each.batch for each in change.steps), default=0)
    whole = f" for {len({each.server for each in change.steps})} servers in {batches} batches" if batches > 1 else ""
    yield f"{what} began at {_clock(change.created_at, facts)} and {state}{whole}."
    mine = [(each, (each.ended_at or facts.wall) - each.started_at) for each in _stages(facts) if each.started_at]
    if batches > 1 and mine:
        first = min(each.started_at or 0.0 for each, _ in mine)
        yield f"This server's turn came after {first - change.created_at:.1f} s: batches follow one another."
    for step, took in sorted(mine, key=lambda each: -each[1])[:_NAMED]:
        if took >= 0.1:
            why = f": {_STAGES[step.name]}" if step.name in _STAGES else ""
            detail = f" ({step.detail})" if step.detail else ""
            yield f"{took:.1f} s of it went by in {step.name}{detail}{why}."
    if change.error:
        yield f"It ended with: {change.error}."


def _clock(at: float, facts: Facts) -> str:
    """The time of day, with the date where that is not today."""
    then = time.localtime(at)
    today = time.localtime(facts.wall)[:3] == then[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
