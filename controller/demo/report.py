"""What the demo shows: figures out of ticks, summaries and the change's record, and the tables made of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from controller.core import warmup
from controller.core.policy import WarmUpPolicy
from controller.demo.load import FAILURES

Tick = Mapping[str, Any]
Record = Mapping[str, Any]

STAGES: Mapping[str, str] = {
    "find": "finding its master",
    "before_drain": "calling its hooks",
    "drain": "taken out of the balancer",
    "notify": "telling its consumers",
    "sessions": "finishing its sessions",
    "empty": "finishing its requests",
    "after_drain": "calling its hooks",
    "settle": "a moment of quiet",
    "terminate": "TERM to its master",
    "exit": "master and workers ending",
    "kill": "killing what is left",
    "deploy": "installing its new version",
    "roll-back": "going back to its old version",
    "reload": "HUP to its master",
    "workers": "its workers being replaced",
    "upgrade": "a new master beside the old one",
    "scale": "changing its number of workers",
    "add": "its line in nginx.conf",
    "remove": "taking its line out of nginx.conf",
    "reset": "forgetting what is held against it",
    "start": "starting gunicorn",
    "up": "waiting for its probes",
    "after_up": "calling its hooks",
    "warm": "warming up",
    "hold": "proving itself",
}


@dataclass(frozen=True, slots=True)
class Window:
    """One server's part of the requests while it warmed, from `begin` to `end` seconds of its warm-up: 0..1."""

    begin: float
    end: float
    requests: int
    measured: float
    formula: float


def shares(ticks: Iterable[Tick]) -> dict[str, float]:
    """Each server's part (0..1) of the short requests in these ticks."""
    counts: dict[str, int] = {}
    for tick in ticks:
        for server, count in tick["servers"].items():
            counts[server] = counts.get(server, 0) + count
    total = sum(counts.values())
    return {server: count / total for server, count in counts.items()} if total else {}


def warming(
    ticks: Iterable[Tick], server: str, begun: float, policy: WarmUpPolicy, others: int, width: float = 1.0
) -> list[Window]:
    """Compare the server's measured part with the formula's, in windows of `width` seconds from `begun` (wall clock).

    With `others` warm servers of the same weight the formula's part is w/(w + others), w as in core/warmup.py, taken in
    the middle of each tick and weighted by the tick's requests.
    """
    warm_up = warmup.begin(policy, epoch=0, cause="", now=begun)
    windows: dict[int, tuple[int, int, float]] = {}
    for tick in ticks:
        middle = (tick["from"] + tick["to"]) / 2
        if not begun <= middle < begun + policy.duration:
            continue
        at = int((middle - begun) / width)
        weight = warmup.share(policy, warm_up, middle)
        here, total = tick["servers"].get(server, 0), sum(tick["servers"].values())
        mine, all_, expected = windows.get(at, (0, 0, 0.0))
        windows[at] = (mine + here, all_ + total, expected + total * weight / (weight + others))
    return [
        Window(at * width, (at + 1) * width, all_, mine / all_, expected / all_)
        for at, (mine, all_, expected) in sorted(windows.items())
        if all_
    ]


def step_of(record: Record, server: str, name: str) -> Mapping[str, Any]:
    """A step of a change's record."""
    found: Mapping[str, Any] = next(s for s in record["steps"] if (s["server"], s["name"]) == (server, name))
    return found


def took(record: Record, server: str, *names: str) -> float:
    """Seconds that these steps took together; steps that were left out took none."""
    spans = [step_of(record, server, name) for name in names]
    return sum(float(s["ended_at"] - s["started_at"]) for s in spans if s["started_at"] and s["ended_at"])


def seconds(value: float) -> str:
    """A duration for people: milliseconds below one second."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def section(title: str, body: RenderableType) -> Group:
    """A table with its heading."""
    return Group(Text(f"\n  {title}", style="bold"), Padding(body, (0, 0, 0, 2)))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left", no_wrap=True)
    return table


def failed(count: int) -> Text:
    """A count of failures, green only when it is 0."""
    return Text(f"{count:,}", style="green" if count == 0 else "bold red")


def requests_table(summary: Record) -> Table:
    """Requests, failures and latencies by kind."""
    table = _table("kind", "requests", "failed", "p50", "p99", "max")
    for kind, row in summary["kinds"].items():
        latencies = [seconds(row[name]) if name in row else "–" for name in ("p50", "p99", "max")]
        table.add_row(kind, f"{row['requests']:,}", failed(sum(row["failures"].values())), *latencies)
    table.add_row("all", f"{summary['requests']:,}", failed(summary["failed"]), style="bold")
    return table


def failures_table(summary: Record) -> RenderableType:
    """How often each kind of failure came; with any, what they mean and the first of them."""
    counts = Columns(
        [Text.assemble((f"{kind} ", "dim"), failed(summary["failures"].get(kind, 0))) for kind in FAILURES],
        padding=(0, 3),
    )
    if not summary["failed"]:
        return counts
    table = _table("failure", "count", "meaning")
    table.columns[2].justify = "left"
    for kind, count in summary["failures"].items():
        table.add_row(kind, failed(count), FAILURES[kind])
    return Group(table, *(Text(example, style="red") for example in summary["examples"][:10]))


def rollout_table(record: Record, masters: Mapping[str, tuple[int | None, int | None]]) -> Table:
    """How long each server took to go offline and to come online, and its gunicorn master before and after."""
    table = _table("server", "emptied", "ended", "started", "up", "warmed", "gunicorn master")
    spans = (("drain", "empty"), ("terminate", "exit", "kill"), ("start",), ("up",), ("warm",))
    for server, (before, after) in masters.items():
        durations = (took(record, server, *names) for names in spans)
        table.add_row(server, *(seconds(each) if each else "–" for each in durations), f"{before} → {after or 'none'}")
    return table


def shares_table(
    before: Mapping[str, float], windows: Mapping[str, Sequence[Window]], after: Mapping[str, float]
) -> Table:
    """Each server's part of the requests: before, while it warmed (measured beside the formula), and after."""
    servers = list(windows)
    table = _table("", *servers)

    def plain(label: str, part: Mapping[str, float]) -> None:
        table.add_row(label, *(f"{part.get(server, 0.0):.1%}" for server in servers))

    plain("before", before)
    rows = max((len(w) for w in windows.values()), default=0)
    for at in range(rows):
        cells = [_beside(windows[server][at : at + 1]) for server in servers]
        window = next(w[at] for w in windows.values() if len(w) > at)
        table.add_row(f"warming, {window.begin:g}–{window.end:g} s", *cells)
    table.add_row("warming, all", *(_beside(windows[server]) for server in servers))
    plain("after", after)
    return table


def _beside(windows: Sequence[Window]) -> Text:
    total = sum(w.requests for w in windows)
    if not total:
        return Text("–")
    measured = sum(w.measured * w.requests for w in windows) / total
    formula = sum(w.formula * w.requests for w in windows) / total
    return Text.assemble(f"{measured:5.1%}", (f" / {formula:5.1%}", "dim"))


def suggestions(headgate: Sequence[str], upstream: str, server: str, url: str, api: Path) -> list[str]:
    """What to try while the demo stays up: lines that a shell takes as they are. `headgate` are the command's words."""
    commands = (
        [*headgate, "status", "--watch"],
        [*headgate, "restart", upstream, server],
        [*headgate, "events", "--follow"],
        ["curl", f"{url}/who"],
        ["curl", "-N", f"{url}/stream"],
        ["curl", "--unix-socket", str(api), "http://headgate/v1/status"],
    )
    return [shlex.join(command) for command in commands]


def live_view(status: Record, record: Record | None, ticks: Sequence[Tick], now: float) -> RenderableType:
    """The picture that moves while the rollout runs; `now` is the wall clock."""
    recent = [tick for tick in ticks[-3:] if tick["servers"]]
    span = sum(tick["to"] - tick["from"] for tick in recent) or 1.0
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("server", no_wrap=True)
    table.add_column("stage", no_wrap=True, min_width=34)
    for column in ("weight", "in flight", "requests/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", min_width=20)
    part = shares(recent)
    for server in status["upstreams"][0]["servers"]:
        address = server["address"]
        rate = sum(tick["servers"].get(address, 0) for tick in recent) / span
        bar = ProgressBar(total=1.0, completed=part.get(address, 0.0), width=20, complete_style="cyan")
        table.add_row(
            address,
            _stage(record, address, now),
            f"{server['effective_weight']:.2f}",
            str(server["in_flight"]),
            f"{rate:.0f}",
            bar,
        )
    line = counts(ticks)
    if record:
        restarted = sum(1 for s in record["steps"] if s["name"] == "hold" and s["state"] == "done")
        line.append(f", {restarted} restarted in {now - record['created_at']:.0f} s")
    return Padding(Group(table, Text(), line), (1, 2))


def counts(ticks: Sequence[Tick]) -> Text:
    """One line: how many requests there have been, and how many have failed."""
    last: Tick = ticks[-1] if ticks else {"requests": 0, "failures": {}, "in_flight": 0}
    bad = failed(sum(last["failures"].values()))
    return Text.assemble(f"{last['requests']:,} requests, ", bad, f" failed, {last['in_flight']} in flight")


def _stage(record: Record | None, server: str, now: float) -> Text:
    steps = [s for s in record["steps"] if s["server"] == server] if record else []
    if not steps or all(s["state"] == "pending" for s in steps):
        return Text("serving", style="green")
    for step in steps:
        if step["state"] == "failed":
            return Text(f"{STAGES[step['name']]}: failed", style="bold red")
        if step["state"] == "running":
            text = f"{STAGES[step['name']]} {max(0.0, now - step['started_at']):.1f} s"
            return Text(text, style="yellow")
    if all(s["state"] in ("done", "skipped") for s in steps):
        return Text("serving, restarted", style="green")
    return Text("…")


def plain_progress(console: Console, record: Record, shown: set[tuple[str, str]]) -> None:
    """For an output that is no terminal: a line for each step that has ended and is not in `shown` yet."""
    for step in record["steps"]:
        key = (step["server"], step["name"])
        if step["state"] in ("done", "failed") and key not in shown:
            shown.add(key)
            at = step["ended_at"] - record["created_at"]
            detail = f" ({step['detail']})" if step["detail"] else ""
            console.print(f"  {at:6.1f} s  {step['server']}  {step['name']} {step['state']}{detail}", highlight=False)
