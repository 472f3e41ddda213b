"""Verdicts from probe results: rise and fall, or rise and suspicion.

A result resets the opposite counter, so that interleaved passes and failures trip neither threshold.
"""

from __future__ import annotations

from dataclasses import replace

from controller.core.model import Health, Peer, WarmUp
from controller.core.policy import HealthPolicy


def observe(peer: Peer, ok: bool, reason: str, policy: HealthPolicy, phi: float | None = None) -> Peer:
    """The peer after one more result; the same object where nothing changes, which is the usual case.

    Up needs `rise` passes in a row. Down needs `fall` failures in a row, or, where the suspicion `phi` is known, one
    and enough of that. `reason` is kept as that of the last failure.
    """
    if ok:
        passes = min(peer.passes + 1, policy.rise)
        risen = peer.health is not Health.UP and passes >= policy.rise
        health, fails = (Health.UP if risen else peer.health), 0
        reason = "" if health is Health.UP else peer.reason
    else:
        fails = min(peer.fails + 1, policy.fall)
        fallen = fails >= policy.fall if phi is None else phi >= policy.phi
        health, passes = (Health.DOWN if fallen else peer.health), 0
    if (health, passes, fails, reason) == (peer.health, peer.passes, peer.fails, peer.reason):
        return peer
    return replace(peer, health=health, passes=passes, fails=fails, reason=reason)


def forget(peer: Peer, cause: str = "restarted") -> Peer:
    """The peer as one that was never probed and does not serve before it is; `cause` is that of its next warm-up."""
    return replace(
        peer, health=Health.UNKNOWN, reason="", passes=0, fails=0, incumbent=False, warm_up=WarmUp(cause=cause)
    )
