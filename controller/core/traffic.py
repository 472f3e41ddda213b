"""What happened between two readings of nginx's counters."""

from __future__ import annotations

from controller.core.model import Readings, Traffic


def between(earlier: Readings, later: Readings) -> dict[str, Traffic]:
    """Each server's counts of that time; servers that one of the readings does not know are left out.

    Counters begin anew with another nginx, and with a server that left and came back: neither gives a difference.
    """
    if earlier.boot != later.boot:
        return {}
    counts = {}
    for key, new in later.servers.items():
        old = earlier.servers.get(key)
        if old is not None and new.requests >= old.requests:
            counts[key] = Traffic(
                new.requests - old.requests,
                max(0, new.answered - old.answered),
                max(0, new.errors - old.errors),
                max(0, new.failures - old.failures),
                max(0, new.timeouts - old.timeouts),
                max(0.0, new.seconds - old.seconds),
            )
    return counts
