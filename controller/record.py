"""What of a new State is to be recorded: only what differs from the one that was recorded last."""

from __future__ import annotations

from collections.abc import Sequence

from controller.core.events import Note
from controller.core.model import State
from controller.ports import Clock, Delta


def between(old: State, new: State, notes: Sequence[Note], clock: Clock, again: bool = False) -> Delta | None:
    """What has come since `old` was recorded, with the notes; None where there is nothing, unless it is to be tried
    `again` because the store failed."""
    if new is old and not notes and not again:
        return None
    peers = {
        (name, key): peer
        for name, group in new.groups.items()
        if group is not old.groups.get(name)
        for key, peer in group.peers.items()
        if name not in old.groups or peer is not old.groups[name].peers.get(key)
    }
    gone = {
        (name, key): None
        for name, group in old.groups.items()
        if group is not new.groups.get(name)
        for key in group.peers
        if name not in new.groups or key not in new.groups[name].peers
    }
    if new.configured and old.stored:  # of servers that left nginx.conf while no daemon ran
        gone |= dict.fromkeys(old.stored.keys() - peers.keys())
    changes = {number: each for number, each in new.changes.items() if each is not old.changes.get(number)}
    numbers = (new.revision, new.next_change, new.next_epoch)
    same = numbers == (old.revision, old.next_change, old.next_epoch)
    if same and not (peers or gone or changes or notes or again):
        return None
    return Delta(clock.now(), clock.wall(), clock.boot(), *numbers, {**gone, **peers}, changes, tuple(notes))
