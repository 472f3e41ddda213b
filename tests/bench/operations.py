"""Failed requests in all operations but rollouts, under load, for each worker class of gunicorn. The figure is 0.

All through one nginx and without any retry, as in tests/bench/rollout.py; each operation is one command and has a load
of its own.

    python -m tests.bench.operations [--only OPERATION]... [sync gthread uvicorn]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from controller.demo.stage import UPSTREAM, WORKERS, Stage, free_ports
from tests.support.operations import DEPLOY, under_load

RATE = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """One operation with one worker class: what was sent, and what failed, by kind."""

    worker: str
    operation: str
    requests: int
    failures: Mapping[str, int]

    @property
    def failed(self) -> int:
        """How many requests failed, of all kinds."""
        return sum(self.failures.values())


def operations(first: str, new: str, workers: int) -> Mapping[str, Sequence[str]]:
    """The words of each command, in an order in which each leaves what the next one needs: the upstream's `first`
    server, of so many workers, goes and comes back alone, a `new` one is added and taken away again."""
    every = {kind: (kind, UPSTREAM) for kind in ("reload", "upgrade", "deploy", "roll-back")}
    return {
        "restart": ("restart", UPSTREAM, first),
        **every,
        "scale by 2 workers": ("scale", UPSTREAM, first, "--workers", str(workers + 2)),
        "scale back": ("scale", UPSTREAM, first, "--workers", str(workers)),
        "scale-out": ("scale-out", UPSTREAM, new),
        "scale-in": ("scale-in", UPSTREAM, new),
    }


def measure(worker: str, only: Sequence[str] = ()) -> Iterator[Row]:
    """Each operation (or `only` these) once; RuntimeError where one is not done, or leaves a server without traffic."""
    with Stage(worker, warm_up=1.0, settings=DEPLOY) as stage:
        options = WORKERS[worker]
        count = int(options[options.index("--workers") + 1])
        for name, words in operations(stage.addresses[0], f"127.0.0.1:{free_ports(1)[0]}", count).items():
            if only and name not in only:
                continue
            ran = under_load(stage, *words, rate=RATE)
            if ran.record["status"] != "done" or not all(ran.serves):
                raise RuntimeError(f"{name}, {worker} workers: {ran.said}")
            yield Row(worker, name, ran.summary["requests"], ran.summary["failures"])


def main() -> int:
    """Print a line for each operation; the exit status is 0 when nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workers", nargs="*", default=list(WORKERS), help=f"of {', '.join(WORKERS)}")
    parser.add_argument("--only", action="append", default=[], choices=list(operations("", "", 0)))
    options = parser.parse_args()
    failed = 0
    for worker in options.workers:
        for row in measure(worker, options.only):
            print(
                f"{worker:<8} {row.operation:<20} {row.failed} of {row.requests:,} failed",
                dict(row.failures),
                flush=True,
            )
            failed += row.failed
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
