"""Notices: a server says that it goes offline, or that it is there again (Sermant's notification by interface)."""

from __future__ import annotations

from dataclasses import replace

from controller.core import change, cold, ejection, guards, health, table
from controller.core.events import (
    ConsumersTold,
    Effect,
    Note,
    OfflineNoticed,
    OnlineNoticed,
    Outcome,
    ProbeNow,
    TellConsumers,
)
from controller.core.model import Admin, Health, Quarantine, Refused, Server, State

_HEARD = 8  # ids of notices that a peer remembers


def named(state: State, server: str, upstream: str | None = None) -> tuple[tuple[str, str], ...]:
    """The servers, as (upstream, key), that a backend means by its own address, in one upstream or in all.

    It may be as written in nginx.conf or, for a backend that does not know how nginx calls it, IP address and port.
    Refused when there is none.
    """
    groups = state.groups.values() if upstream is None else (change.group_of(state, upstream),)
    found = tuple(
        (group.upstream.name, each.key)
        for group in groups
        for each in group.upstream.servers
        if server in (each.key, each.address, _socket(each))
    )
    if not found:
        who = "no managed upstream has" if upstream is None else f"{upstream} has no"
        known = ", ".join(dict.fromkeys(each.key for group in groups for each in group.upstream.servers)) or "none"
        raise Refused("not_found", f"{who} server {server!r}", f"servers that are managed: {known}")
    return found


def _socket(server: Server) -> str:
    if not server.port:
        return server.ip
    return f"[{server.ip}]:{server.port}" if ":" in server.ip else f"{server.ip}:{server.port}"


def offline(state: State, event: OfflineNoticed, now: float) -> tuple[State, Outcome]:
    """Quarantine the server. Refused for an unknown one, and for the last that serves: an upstream is never emptied.

    A notice with an id that was heard before is acknowledged and changes nothing: it may be a late repetition that
    reaches a server which was restarted since. Consumers are told once: not of a server whose notice stands already,
    nor of one that is drained, for they were told then.
    """
    group = change.group_of(state, event.upstream)
    keys = change.resolve(group, (event.server,))
    if event.id and all(event.id in group.peers[key].heard for key in keys):
        return state, Outcome(replayed=True)
    guards.refuse_emptying(group, keys, "take it away with `headgate drain --force`")
    seconds = group.upstream.policy.quarantine.duration if event.seconds is None else event.seconds
    why = event.why or "it says that it goes offline"
    effects: list[Effect] = []
    for key in keys:
        peer = state.groups[event.upstream].peers[key]
        kept = tuple(entry for entry in peer.quarantine if entry.kind != "notice")
        heard = (*peer.heard, event.id)[-_HEARD:] if event.id else peer.heard
        entry = Quarantine(now + seconds, why, "notice")
        state = table.with_peer(state, event.upstream, key, replace(peer, quarantine=(*kept, entry), heard=heard))
        text = f"{event.upstream}: {key} is quarantined for {seconds:g} s: {why}"
        effects.append(Note("quarantine", text, event.upstream, key))
        if (
            group.upstream.policy.notices.enabled
            and len(kept) == len(peer.quarantine)
            and peer.admin is not Admin.DRAIN
        ):
            effects.append(TellConsumers(event.upstream, key))
    return state, Outcome(tuple(effects))


def told(event: ConsumersTold) -> Note:
    """What came of telling the consumers, as a note."""
    text = f"{event.upstream}: told that {event.server} goes offline: {event.said}"
    return Note("notice", text, event.upstream, event.server)


def online(state: State, event: OnlineNoticed, now: float) -> tuple[State, Outcome]:
    """End what keeps the server away, and see that it is probed at once and warms up: it has been started anew."""
    group = change.group_of(state, event.upstream)
    effects: list[Effect] = []
    for key in change.resolve(group, (event.server,)):
        peer = ejection.forgive(group.peers[key], everything=True)
        text = f"{event.upstream}: {key} says that it is there again"
        effects += [Note("quarantine", text, event.upstream, key), ProbeNow(event.upstream, key)]
        if peer.admin is Admin.READY and key not in table.serving(group):
            peer = health.forget(peer)
        state = table.with_peer(state, event.upstream, key, peer)
        if peer.admin is Admin.READY and peer.health is Health.UP:
            state = cold.warm_up(state, event.upstream, key, "restarted", now)
    return state, Outcome(tuple(effects))
