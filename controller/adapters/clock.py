"""The machine's clocks (ports.Clock)."""

from __future__ import annotations

import time
from pathlib import Path


class SystemClock:
    """CLOCK_MONOTONIC to reckon with, the wall clock to show, the kernel's boot id to tell one uptime from the next."""

    def __init__(self) -> None:
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch, for display only."""
        return time.time()

    def boot(self) -> str:
        """An id that changes when the machine reboots, that is, when `now` starts afresh."""
        return self._boot
