"""Failed requests in rolling restarts under load, for each worker class of gunicorn. The figure is 0, in every run.

Three rollouts one after another, and more until enough requests have been sent, all through one nginx: keep-alive and
one-shot clients in equal parts, GET and POST with a body, 3 s requests and 5 s event streams; no retry anywhere.

    python -m tests.bench.rollout [--requests 50000] [--rollouts 3] [--rate 600] [sync gthread uvicorn]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from controller.demo.stage import UPSTREAM, WORKERS, Load, Stage

WARM_UP = 3.0
PATIENCE = 300.0
_RELOAD = ", reconfiguring"  # what nginx logs when it reads its configuration again


@dataclass(frozen=True)
class Row:
    """One worker class: what was sent through how many rollouts, what failed, by kind, and how often nginx reloaded."""

    worker: str
    rollouts: int
    seconds: float
    requests: int
    failures: Mapping[str, int]
    examples: Sequence[str]
    reloads: int

    @property
    def failed(self) -> int:
        """How many requests failed, of all kinds."""
        return sum(self.failures.values())


def roll(stage: Stage, load: Load) -> None:
    """One rollout, to its end; RuntimeError unless it is done."""
    change = stage.client.begin_change("rollout", UPSTREAM)
    deadline = time.monotonic() + PATIENCE
    record = stage.client.change(change)
    while record["status"] == "running":
        if time.monotonic() > deadline:
            raise RuntimeError(f"change {change} has not ended within {PATIENCE:g} s")
        record = stage.client.change(change, wait=1, seen=record["version"])
        load.read()
    if record["status"] != "done":
        raise RuntimeError(f"change {change} is {record['status']}: {record['error']}")


def measure(
    worker: str,
    requests: int = 50_000,
    rollouts: int = 3,
    rate: float = 600.0,
    data_plane: str = "lua",
    one_shot: float = 0.5,
) -> Row:
    """Roll one worker class, at least `rollouts` times and until `requests` have ended, at `rate` a second.

    `one_shot` is the share of the requests with a connection of their own; the others are sent over kept ones.
    """
    with Stage(worker, warm_up=WARM_UP, data_plane=data_plane) as stage:
        log = stage.prefix / "nginx.log"
        before = log.read_text().count(_RELOAD)
        load = stage.load(rate, "--one-shot", str(one_shot))
        done = 0
        while done < rollouts or load.ticks[-1]["requests"] < requests:
            roll(stage, load)
            done += 1
        summary = load.finish()
        reloads = log.read_text().count(_RELOAD) - before
    return Row(worker, done, summary["seconds"], summary["requests"], summary["failures"], summary["examples"], reloads)


def compare(
    workers: Sequence[str] = tuple(WORKERS),
    requests: int = 50_000,
    rollouts: int = 3,
    rate: float = 600.0,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure each worker class; `tell` hears of each row as it comes."""
    rows = []
    for worker in workers:
        rows.append(measure(worker, requests, rollouts, rate))
        tell(rows[-1])
    return rows


def line(row: Row) -> str:
    """A row for people."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in row.failures.items()) or "of any kind"
    return (
        f"{row.worker:<9}{row.requests:>8,} requests  {row.failed:>4,} failed ({kinds})  "
        f"{row.rollouts} rollouts in {row.seconds:.0f} s  nginx reloaded {row.reloads} times"
    )


def main() -> int:
    """Print a row for each worker class; the exit status is 0 when nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workers", nargs="*", default=list(WORKERS), help=f"of {', '.join(WORKERS)}")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--rate", type=float, default=600.0)
    options = parser.parse_args()

    def tell(row: Row) -> None:
        print(line(row), *(f"    {example}" for example in row.examples), sep="\n", flush=True)

    rows = compare(options.workers, options.requests, options.rollouts, options.rate, tell)
    return 0 if all(row.failed == 0 and row.reloads == 0 for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
