"""Flap damping: a server whose health changes too often rests, longer each time, instead of coming and going.

`changed` has the times of its last changes of health; coming back from a rest counts as one. `rests` falls by one for
each `flap_window` between two changes, rests not counted.
"""

from __future__ import annotations

import math
from dataclasses import replace

from controller.core.model import Peer, Quarantine
from controller.core.policy import HealthPolicy

KIND = "flapping"


def resting(peer: Peer) -> bool:
    """Whether it rests."""
    return any(entry.kind == KIND for entry in peer.quarantine)


def count(peer: Peer, policy: HealthPolicy, now: float) -> Peer:
    """The peer with one more change of its health."""
    if not policy.flaps:
        return peer
    calm = now - peer.changed[-1] if peer.changed and not resting(peer) else 0.0
    recent = tuple(at for at in peer.changed if now - at < policy.flap_window)
    return replace(
        peer,
        changed=(*recent[-policy.flaps :], now),
        rests=max(0, peer.rests - int(calm / policy.flap_window)),
    )


def too_often(peer: Peer, policy: HealthPolicy) -> bool:
    """Whether it changed more than `flaps` times within the window."""
    return 0 < policy.flaps < len(peer.changed)


def rest(peer: Peer, policy: HealthPolicy, now: float) -> Peer:
    """The peer, put to rest; one that flaps on while it rests does so for longer."""
    rests = min(peer.rests + 1, math.ceil(policy.flap_cap / policy.flap_hold))
    until = now + min(policy.flap_hold * rests, policy.flap_cap)
    why = f"its health changed {len(peer.changed)} times within {policy.flap_window:g} s"
    others = tuple(entry for entry in peer.quarantine if entry.kind != KIND)
    return replace(peer, quarantine=(*others, Quarantine(until, why, KIND)), changed=(), rests=rests)
