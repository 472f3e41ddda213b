"""Whether this edge host takes traffic: what the tier above (keepalived, a load balancer) is answered."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from controller.core import change, table
from controller.core.events import EdgeTold, Effect, Note
from controller.core.model import State


def obstacles(state: State, upstreams: Collection[str] = ()) -> list[str]:
    """Why traffic should go to another edge, as sentences; empty when it may come.

    Of upstreams those named count, or all; Refused where there is none of that name. One serves while at least one of
    its servers does by its own right, not by failing open.
    """
    groups = [change.group_of(state, name) for name in upstreams] or state.groups.values()
    found = ["this edge is offline by `headgate edge drain`"] if state.offline else []
    if state.plane.error:
        found.append(state.plane.error)
    elif state.plane.revision < state.revision:
        why = f": {state.plane.refused}" if state.plane.refused else ""
        found.append(f"nginx serves table {state.plane.revision}, and {state.revision} is the newest{why}")
    if not state.configured:
        found.append(state.config_error or "nginx.conf has not been read yet")
    return found + [f"{each.upstream.name}: {table.count(each)}" for each in groups if not table.serves(each)]


def told(state: State, event: EdgeTold) -> tuple[State, list[Effect]]:
    """The state after somebody, or an earlier life, took this edge offline or back."""
    if state.offline == event.offline:
        return state, []
    text = "this edge goes offline: checks are answered no" if event.offline else "this edge is online again"
    return replace(state, offline=event.offline), [Note("edge", text)]
