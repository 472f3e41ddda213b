"""The drain table: from requested to empty, or to the deadline with its policy.

A drain is complete by proof, never by waiting: nginx served a table in which the server drains, and its count of
in-flight requests, read after that, was 0 (a pick counts before it looks at the table; see docs/data-plane.md).
"""

from __future__ import annotations

import enum

from controller.core.events import PeerSeen
from controller.core.policy import DrainPolicy

_BLIND = 5.0  # seconds past the deadline in which nginx may still say that the server is empty


class Verdict(enum.Enum):
    """What a draining server's last reading means."""

    WAIT = "wait"
    EMPTY = "empty"
    ABORT = "abort"
    PROCEED = "proceed"


#: (the server is proved empty, the deadline has passed, the policy) -> verdict
TABLE: dict[tuple[bool, bool, str], Verdict] = {
    (True, False, "abort"): Verdict.EMPTY,
    (True, True, "abort"): Verdict.EMPTY,
    (True, False, "proceed"): Verdict.EMPTY,
    (True, True, "proceed"): Verdict.EMPTY,
    (False, False, "abort"): Verdict.WAIT,
    (False, False, "proceed"): Verdict.WAIT,
    (False, True, "abort"): Verdict.ABORT,
    (False, True, "proceed"): Verdict.PROCEED,
}


def verdict(policy: DrainPolicy, requested: float, revision: int, seen: PeerSeen | None, now: float) -> Verdict:
    """Judge a drain that was `requested` at a time and published as `revision`, by a reading of the counters.

    The deadline is judged together with a reading; where none comes at all, a little later without one.
    """
    current = seen is not None and seen.revision >= revision
    empty = current and seen is not None and seen.in_flight == 0
    late = now - requested >= policy.timeout + (0.0 if current else _BLIND)
    return TABLE[empty, late, policy.on_timeout]
