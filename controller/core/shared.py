"""One process behind several upstreams: every peer with its IP address and port leaves the traffic and comes back with
it, whichever upstream a change is about.

Such a peer is held by the change. What operators want of it (`admin`) stays as it is, and holds again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from controller.core import ejection, health, table
from controller.core.events import Effect, Note, ProbeNow
from controller.core.model import (
    Admin,
    Change,
    ChangeKind,
    Group,
    Health,
    Mate,
    Peer,
    Server,
    State,
    Step,
    StepName,
    WarmUp,
)


def mates(state: State, upstream: str, keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The other peers that are the processes of these servers, by upstream; the upstream itself may be among them."""
    mine = _sockets(state, upstream, keys)
    found = {
        name: tuple(s.key for s in group.upstream.servers if _socket(s) in mine)
        for name, group in state.groups.items()
        if name != upstream
    }
    if upstream in state.groups:
        own = (s for s in state.groups[upstream].upstream.servers if s.key not in keys)
        found[upstream] = tuple(s.key for s in own if _socket(s) in mine)
    return {name: each for name, each in found.items() if each}


def linked(state: State, upstream: str) -> frozenset[str]:
    """The upstreams that have a process in common with this one, with itself."""
    if upstream not in state.groups:
        return frozenset({upstream})
    keys = tuple(state.groups[upstream].peers)
    return frozenset({upstream, *mates(state, upstream, keys)})


def once(group: Group, keys: Sequence[str]) -> tuple[str, ...]:
    """These servers without those that are the process of one before them."""
    known = {s.key: _socket(s) for s in group.upstream.servers}
    found: dict[tuple[str, int], str] = {}
    for key in keys:
        found.setdefault(known[key], key)
    return tuple(found.values())


def meet(state: State, change: Change, upstream: str, keys: Iterable[str]) -> bool:
    """Whether a change handles the process of one of these servers."""
    servers = {step.server for step in change.steps}
    if change.upstream == upstream and servers & set(keys):
        return True
    return bool(_sockets(state, change.upstream, servers) & _sockets(state, upstream, keys))


def hold(state: State, change: Change, server: str) -> tuple[State, tuple[Mate, ...], list[Effect]]:
    """Take the mates of a server out of the traffic, for this change; they, and whether they served."""
    found: list[Mate] = []
    effects: list[Effect] = []
    for name, keys in mates(state, change.upstream, (server,)).items():
        serving = table.serving(state.groups[name])
        for key in keys:
            found.append(Mate(name, key, key in serving))
            state = _with(state, name, key, held=change.id)
            text = f"{name}: {key} drains: change {change.id} ({change.kind} of {change.upstream}) handles its process"
            effects.append(Note("admin", text, name, key, change.id))
    return state, tuple(found), effects


def hold_new(state: State) -> State:
    """The state after nginx.conf was read: peers that are new in it leave the traffic, too, while their process is in
    the hands of a change."""
    for change in [each for each in state.changes.values() if not each.status.ended]:
        for at, step in enumerate(change.steps):
            later = [each for each in change.steps[at:] if each.server == step.server]
            back = any(each.name is StepName.UP and each.started is not None for each in later)
            if step.name is not StepName.DRAIN or step.started is None or back or _given_back(state, change, step):
                continue
            state, found, _ = hold(state, change, step.server)
            known = {(mate.upstream, mate.server) for mate in step.mates}
            new = tuple(mate for mate in found if (mate.upstream, mate.server) not in known)
            if new:
                steps = (*change.steps[:at], replace(step, mates=(*step.mates, *new)), *change.steps[at + 1 :])
                change = replace(change, steps=steps)
                state = replace(state, changes={**state.changes, change.id: change})
    return state


def _given_back(state: State, change: Change, drained: Step) -> bool:
    """Whether the server of this step has its place again: then its process was not touched."""
    peer = peer_of(state, Mate(change.upstream, drained.server))
    return peer is None or peer.admin is not Admin.DRAIN or change.kind is ChangeKind.DRAIN


def release(state: State, change: int, held: Iterable[Mate]) -> State:
    """Give back what this change holds and has not touched."""
    for mate in held:
        if (peer := peer_of(state, mate)) and peer.held == change:
            state = _with(state, mate.upstream, mate.server, held=0)
    return state


def started(state: State, upstream: str, server: str) -> tuple[State, list[Effect]]:
    """The process of a server was started: its mates serve once their own probes say so, if they are wanted."""
    effects: list[Effect] = []
    for name, keys in mates(state, upstream, (server,)).items():
        serving = table.serving(state.groups[name])
        for key in keys:
            peer = state.groups[name].peers[key]
            if key in serving:
                continue
            if peer.admin is not Admin.MAINT:
                peer = health.forget(ejection.forgive(peer))
                effects.append(ProbeNow(name, key))
            state = table.with_peer(state, name, key, replace(peer, held=0))
    return state, effects


def freed(state: State, change: Change) -> State:
    """The state as if a change had ended well: what it stops is stopped, the rest serves and is warm."""
    servers = tuple(dict.fromkeys(step.server for step in change.steps))
    stops = change.kind in (ChangeKind.STOP, ChangeKind.SCALE_IN)
    for key in servers:
        if peer_of(state, Mate(change.upstream, key)):
            admin = Admin.MAINT if stops else Admin.READY
            state = _with(state, change.upstream, key, held=0, admin=admin, **_WARM)
    for name, keys in mates(state, change.upstream, servers).items():
        for key in keys:
            state = _with(state, name, key, held=change.id if stops else 0, **_WARM)
    return replace(state, changes={n: each for n, each in state.changes.items() if n != change.id})


def peer_of(state: State, mate: Mate) -> Peer | None:
    """The living side of a mate; None where nginx.conf has lost it."""
    group = state.groups.get(mate.upstream)
    return group.peers.get(mate.server) if group else None


_WARM: dict[str, object] = {"health": Health.UP, "warm_up": WarmUp(), "sessions": False, "ejected": None}


def _with(state: State, upstream: str, key: str, **parts: object) -> State:
    peer = replace(state.groups[upstream].peers[key], **parts)  # type: ignore[arg-type]
    return table.with_peer(state, upstream, key, peer)


def _sockets(state: State, upstream: str, keys: Iterable[str]) -> set[tuple[str, int]]:
    group, wanted = state.groups.get(upstream), set(keys)
    return {_socket(s) for s in group.upstream.servers if s.key in wanted} if group else set()


def _socket(server: Server) -> tuple[str, int]:
    return server.ip, server.port
