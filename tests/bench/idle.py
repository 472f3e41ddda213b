"""A daemon that does nothing but probe: processor time and memory.

python -m tests.bench.idle [SECONDS [SERVERS [SETTINGS]]]
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


EVERY_SECOND = '[defaults.check]\ninterval = "1s"\n'


def measure(seconds: float = 30.0, servers: int = 2, settings: str = "") -> Figures:
    """Start the daemon with 10 upstreams of so many servers, let every probe rise, then look at it for some seconds."""
    with house(10, servers, settings) as built:
        before, began = _processor_seconds(built.daemon), time.monotonic()
        time.sleep(seconds)  # the measurement itself
        used, passed = _processor_seconds(built.daemon) - before, time.monotonic() - began
        return Figures(used / passed, psutil.Process(built.daemon).memory_info().rss / 1e6)


def _processor_seconds(pid: int) -> float:
    """What all threads of a process have used, to the nanosecond; the usual times count in ticks."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


if __name__ == "__main__":
    numbers = sys.argv[1:3]
    print(measure(*map(int, numbers), *sys.argv[3:]))
