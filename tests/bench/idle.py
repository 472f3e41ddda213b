"""An idle daemon: processor time and memory with 10 upstreams of 2 servers, default settings.

python -m tests.bench.idle [SECONDS]
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import psutil

from tests.bench.house import house


@dataclass(frozen=True, slots=True)
class Figures:
    """`cpu` is the part of one core, `memory` the resident set in MB."""

    cpu: float
    memory: float


def measure(seconds: float = 30.0) -> Figures:
    """Start the daemon, let every probe rise, then look at it for some seconds."""
    with house(upstreams=10, servers=2) as built:
        process = psutil.Process(built.daemon)
        before, began = process.cpu_times(), time.monotonic()
        time.sleep(seconds)  # the measurement itself
        after, passed = process.cpu_times(), time.monotonic() - began
        used = after.user + after.system - before.user - before.system
        return Figures(used / passed, process.memory_info().rss / 1e6)


if __name__ == "__main__":
    print(measure(*map(float, sys.argv[1:])))
