"""An idle daemon: processor time and memory with 10 upstreams of 2 servers, default settings.

python -m tests.bench.idle [SECONDS]
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

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
        before, began = _processor_seconds(built.daemon), time.monotonic()
        time.sleep(seconds)  # the measurement itself
        used, passed = _processor_seconds(built.daemon) - before, time.monotonic() - began
        return Figures(used / passed, psutil.Process(built.daemon).memory_info().rss / 1e6)


def _processor_seconds(pid: int) -> float:
    """What all threads of a process have used, to the nanosecond; the usual times count in ticks."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


if __name__ == "__main__":
    print(measure(*map(float, sys.argv[1:])))
