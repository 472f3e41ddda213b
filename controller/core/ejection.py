"""nginx ejects servers by itself, at once; here that is followed, and forgiven when a server was restarted.

A mark, by which a server says in a response that it goes offline, becomes a quarantine of ours, which outlives nginx.
"""

from __future__ import annotations

from dataclasses import replace

from controller.core import flapping, table
from controller.core.events import Effect, Note, TrafficSeen
from controller.core.model import Ejection, Group, Peer, Quarantine, State
from controller.core.policy import OutlierPolicy

MARK = "mark"
_DRIFT = 1.0  # seconds by which two readings of the same end may differ


def mirror(state: State, event: TrafficSeen, now: float) -> tuple[State, list[Effect]]:
    """Follow what nginx says of its ejections, each with a note at its begin and its end.

    While nginx does not serve our newest table yet it may still tell of what was forgiven, and is not followed. While
    the upstream fails open nginx ignores its ejections, and they end here when their time has come.
    """
    if event.upstream not in state.groups or state.plane.revision < state.revision:
        return state, []
    effects: list[Effect] = []
    for key, traffic in event.servers.items():
        group = state.groups[event.upstream]
        before = group.peers.get(key)
        if before is None:
            continue
        found = traffic.ejected if traffic.ejected and traffic.ejected.until > now else None
        if found and found.reason == MARK:
            peer = _marked(before, found) if group.upstream.policy.quarantine.marks else before
        elif found or not group.fail_open:
            peer = _ejected(before, found)
        else:
            continue
        if peer is before:
            continue
        state = table.with_peer(state, event.upstream, key, peer)
        effects += _notes(state.groups[event.upstream], key, before, peer, now)
    return state, effects


def ended(group: Group, key: str) -> Note:
    """The note that an ejection is over."""
    name = group.upstream.name
    return Note("ejection", f"{name}: {key} is no longer ejected; {table.count(group)}", name, key)


def clear(state: State) -> State:
    """Another nginx runs, which has ejected nobody yet."""
    for name, group in state.groups.items():
        for key, peer in group.peers.items():
            if peer.ejected:
                state = table.with_peer(state, name, key, replace(peer, ejected=None))
    return state


def forgive(peer: Peer, everything: bool = False) -> Peer:
    """The peer without quarantines and ejections, which nginx forgets as well: it is not the one that earned them.

    A rest for flapping goes on, unless `everything` is forgiven.
    """
    kept = () if everything else tuple(entry for entry in peer.quarantine if entry.kind == flapping.KIND)
    peer = replace(peer, quarantine=kept, ejected=None, ejections=0, forgiven=peer.forgiven + 1)
    return replace(peer, changed=(), rests=0) if everything else peer


def forgiven(name: str, key: str, before: Peer, after: Peer, why: str) -> list[Effect]:
    """A note, where something that kept the server away was forgiven."""
    if len(after.quarantine) == len(before.quarantine) and before.ejected is None:
        return []
    what = "ejection" if before.ejected else "quarantine"
    return [Note(what, f"{name}: the {what} of {key} ends early: {why}", name, key)]


def _marked(peer: Peer, found: Ejection) -> Peer:
    known = next((entry for entry in peer.quarantine if entry.kind == MARK), None)
    if known and abs(known.until - found.until) < _DRIFT:
        return peer
    others = tuple(entry for entry in peer.quarantine if entry.kind != MARK)
    return replace(
        peer, quarantine=(*others, Quarantine(found.until, "it said in a response that it goes offline", MARK))
    )


def _ejected(peer: Peer, found: Ejection | None) -> Peer:
    known = peer.ejected
    if known is None and found is None:
        return peer
    if known and found and (known.reason, known.times) == (found.reason, found.times):
        return peer if abs(known.until - found.until) < _DRIFT else replace(peer, ejected=found)
    # Passes are counted anew, so that `rise` of them tell of a server that only its traffic finds dead.
    if found is None:
        return replace(peer, ejected=None)
    again = not any(map(table.judged, peer.quarantine))  # or out as an outlier already, of whom nginx saw some more
    return replace(peer, ejected=found, passes=0, taken_out=peer.taken_out + again)


def _notes(group: Group, key: str, before: Peer, peer: Peer, now: float) -> list[Effect]:
    name, count = group.upstream.name, table.count(group)
    if len(peer.quarantine) > len(before.quarantine):
        entry = peer.quarantine[-1]
        text = f"{name}: {key} is quarantined for {entry.until - now:.0f} s: {entry.why}; {count}"
        return [Note("quarantine", text, name, key)]
    if peer.ejected and (before.ejected is None or peer.ejected.times != before.ejected.times):
        left = f"{peer.ejected.until - now:.0f} s"
        why = reason(peer.ejected, group.upstream.policy.outlier)
        return [Note("ejection", f"{name}: nginx ejected {key} for {left} after {why}; {count}", name, key)]
    if before.ejected and peer.ejected is None:
        return [ended(group, key)]
    return []


def reason(ejection: Ejection, policy: OutlierPolicy) -> str:
    """Why nginx ejects, as a phrase: `5 timeouts in a row`."""
    return {
        "errors": f"{policy.errors} failures in a row",
        "timeouts": f"{policy.timeouts} timeouts in a row",
        "server_errors": f"{policy.server_errors} answers with status 5xx in a row",
    }.get(ejection.reason, ejection.reason)
