"""The demo's plot: build the stage, send traffic, roll, show the figures, stay up for a look around, leave nothing."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from controller.demo import report
from controller.demo.stage import UPSTREAM, Load, Stage, StageError, tail
from controller.errors import DaemonUnreachable, HeadgateError

RATE = 250.0
LIGHT_RATE = 20.0
BEFORE, AFTER = 4.0, 3.0  # seconds of traffic around the rollout
PATIENCE = 300.0  # seconds that a rollout may take
GLANCE = 0.25  # seconds between two looks


def run(once: bool) -> int:
    """Run the demo; see controller.demo.run."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    try:
        with _interruptible(), ExitStack() as stack:
            with console.status("Starting nginx, three gunicorn masters and the daemon …"):
                stage = stack.enter_context(Stage())
            good = _play_or_tell(console, stage)
            if not once:
                _stay(console, stage)
            console.print("Ending everything …", style="dim")
    except HeadgateError as error:
        console.print(f"\nThe demo has failed: {error.message}", style="red", markup=False, soft_wrap=True)
        if error.remedy:
            console.print(f"What helps: {error.remedy}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted: everything is ended and deleted.")
        return 130
    return 0 if good else 1


@contextmanager
def _interruptible() -> Iterator[None]:
    """TERM and a closed terminal end the demo as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _play_or_tell(console: Console, stage: Stage) -> bool:
    try:
        return _play(console, stage)
    except DaemonUnreachable as error:
        log = tail(stage.prefix / "headgate.log")
        raise StageError(f"{error.message}; the daemon's log ends with:{log}") from error


def _play(console: Console, stage: Stage) -> bool:
    """Traffic, a rollout under it, the figures. True when it is done, nothing failed and nginx was not reloaded."""
    masters = {address: stage.master(address) for address in stage.addresses}
    workers = stage.nginx_workers()
    console.print(
        f"\n[bold]A rolling restart under traffic[/]\n\n  nginx at {stage.url}, {len(masters)} gunicorn masters behind "
        f"it, {RATE:.0f} requests a second.\n  Nothing is retried: nginx has proxy_next_upstream off, and a client "
        "sends each request once.\n"
    )
    load = stage.load(RATE)
    _watch(console, stage, load, None, BEFORE)
    change = stage.client.begin_change("rollout", UPSTREAM)
    record = _watch(console, stage, load, change, PATIENCE)
    _watch(console, stage, load, None, AFTER)
    with console.status("The last requests finish …"):
        summary = load.finish()
    pids = {address: (pid, stage.master(address)) for address, pid in masters.items()}
    reloaded = stage.nginx_workers() != workers
    _figures(console, stage, record, summary, load.ticks, pids)

    done = record["status"] == "done"
    if done:
        text = f"rollout of {UPSTREAM}: done in {record['ended_at'] - record['created_at']:.1f} s"
    else:
        text = f"rollout of {UPSTREAM}: {record['status']}, {record['error']}"
    console.print(f"\n  {text}", style="green" if done else "bold red", markup=False)
    listed = ", ".join(str(pid) for pid, _ in sorted(workers))
    kept = f"nginx: 0 reloads, workers {listed} served from the first request to the last"
    console.print(f"  {'nginx has new workers: it was reloaded or restarted' if reloaded else kept}")
    console.print(
        Text.assemble("  ", report.failed(summary["failed"]), f" failed requests of {summary['requests']:,}\n"),
        style="bold",
    )
    return (
        done and not reloaded and summary["failed"] == 0 and all(new not in (old, None) for old, new in pids.values())
    )


def _watch(console: Console, stage: Stage, load: Load, change: int | None, limit: float) -> dict[str, Any]:
    """Show the scene until the change has ended, or without one for `limit` seconds; the change's record."""
    deadline = time.monotonic() + limit
    record: dict[str, Any] = {}
    shown: set[tuple[str, str]] = set()
    with _moving(console) as show:
        while True:
            load.read()
            if change is not None:
                record = stage.client.change(change, wait=GLANCE, seen=record.get("version", -1))
                if not console.is_terminal:
                    report.plain_progress(console, record, shown)
            else:
                time.sleep(GLANCE)
            if console.is_terminal:
                show(report.live_view(stage.client.status(), record or None, load.ticks, time.time()))
            if change is not None and record["status"] != "running":
                return record
            if time.monotonic() > deadline:
                if change is not None:
                    log = tail(stage.prefix / "headgate.log")
                    raise StageError(f"the rollout has not ended within {limit:g} s; the daemon's log ends with:{log}")
                return record


@contextmanager
def _moving(console: Console) -> Iterator[Callable[[Any], None]]:
    if not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda view: live.update(view, refresh=True)


def _figures(
    console: Console,
    stage: Stage,
    record: Mapping[str, Any],
    summary: Mapping[str, Any],
    ticks: Sequence[report.Tick],
    pids: Mapping[str, tuple[int | None, int | None]],
) -> None:
    before = report.shares(tick for tick in ticks if tick["to"] <= record["created_at"])
    after = report.shares(tick for tick in ticks if tick["from"] >= (record["ended_at"] or 0.0))
    windows = {
        address: report.warming(ticks, address, step["started_at"], stage.warm_up, others=len(pids) - 1)
        for address in pids
        if (step := report.step_of(record, address, "warm"))["started_at"]
    }
    console.print(report.section("Rollout", report.rollout_table(record, pids)))
    if windows:
        title = "Part of the requests (while it warms: measured / formula)"
        console.print(report.section(title, report.shares_table(before, windows, after)))
    console.print(report.section("Requests", report.requests_table(summary)))
    console.print(report.section("Failures", report.failures_table(summary)))


def _stay(console: Console, stage: Stage) -> None:
    """Stay up, with a little traffic, until somebody interrupts."""
    script = Path(sys.executable).with_name("headgate")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "controller"]
    console.print(f"[bold]It stays up, with {LIGHT_RATE:.0f} requests a second.[/] In another terminal:\n")
    headgate = [*program, "--config", str(stage.settings)]
    for line in report.suggestions(headgate, UPSTREAM, stage.addresses[0], stage.url, stage.prefix / "api.sock"):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("\nCtrl-C ends everything and deletes its files.\n")
    load = stage.load(LIGHT_RATE, interval=2.0)
    try:
        with _moving(console) as show:
            while True:
                load.read()
                show(report.counts(load.ticks))
                time.sleep(GLANCE)
    except KeyboardInterrupt:
        console.print(report.counts(load.ticks))
