"""What is to be recorded: of a new State what differs from the last one, and of a change that has ended what it did."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from controller.core import guards, outcome
from controller.core.events import Note
from controller.core.model import Group, State
from controller.ports import ChangeRecord, Clock, Delta, Store


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


async def judged(store: Store, record: ChangeRecord, group: Group | None) -> ChangeRecord:
    """The record of a change with what it did, once it has ended and where it was planned; StoreError.

    `group` is its upstream, None where nginx.conf has lost it: then nothing is known of the usual shares.
    """
    if record.plan is None or record.outcome or record.ended_at is None:
        return record
    since, until = int(record.created_at), int(record.ended_at) + 1
    seconds: dict[int, dict[str, float]] = {}
    for row in await store.traffic(record.upstream, since, until, 1):
        seconds.setdefault(row.at, {})[row.server] = row.requests
    usual = guards.usual(group) if group else {}
    steps = [outcome.Stage(each.name, each.server, each.started_at, each.ended_at) for each in record.steps]
    times = (record.created_at, record.ended_at, record.plan.before)
    happened = await asyncio.to_thread(outcome.happened, *times, steps, seconds, usual)
    await store.save_outcome(record.id, happened)
    return replace(record, outcome=happened)
