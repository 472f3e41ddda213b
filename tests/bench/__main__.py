"""`make bench`: the figures that Headgate is to reach, each measured in this run, as a table.

Speed is quoted as a ratio within the run wherever a comparison exists; docs/figures.md says what each row means.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.bench import (
    config_speed,
    drains,
    edit_speed,
    faults,
    idle,
    operations,
    plane_cpu,
    probe_cpu,
    reload_cost,
    rollout,
    slow_server,
    store_size,
    warming,
)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured, beside the figure to reach; `reached` is None where the row is there to compare with."""

    what: str
    measured: str
    wanted: str
    reached: bool | None


def yardstick() -> Row:
    """How quick this machine is just now, for what is measured in seconds: its processor, and its system calls."""
    began, total = time.process_time(), 0
    for number in range(10_000_000):
        total += number
    counted = time.process_time()
    for _ in range(100_000):
        os.lstat("/")
    called = time.process_time() - counted
    measured = f"{counted - began:.2f} s, {called * 10:.1f} us"
    return Row("yardstick: 10,000,000 additions in Python, an lstat", measured, "", None)


def rollouts() -> Iterator[Row]:
    """Failed requests over three rollouts, for each worker class."""
    for worker in rollout.WORKERS:
        row = rollout.measure(worker)
        kinds = "".join(f", {kind} {count}" for kind, count in row.failures.items())
        measured = f"{row.failed} of {row.requests:,} in {row.rollouts} rollouts{kinds}"
        yield Row(f"failed requests, {worker} workers", measured, "0", row.failed == 0 and row.reloads == 0)


def operating() -> Iterator[Row]:
    """Failed requests in every other kind of operation, over the worker classes."""
    rows = [row for worker in operations.WORKERS for row in operations.measure(worker)]
    for name in dict.fromkeys(row.operation for row in rows):
        mine = [row for row in rows if row.operation == name]
        measured = ", ".join(f"{row.worker} {row.failed} of {row.requests:,}" for row in mine)
        yield Row(f"failed requests, {name}", measured, "0", not any(row.failed for row in mine))


def reloading_rollouts() -> Iterator[Row]:
    """The same rollout on the reload plane: what its reloads cost clients that keep their connections."""
    for one_shot, clients in ((1.0, "one-shot"), (0.0, "keep-alive")):
        row = rollout.measure("gthread", 10_000, 1, 200.0, "reload", one_shot)
        measured = f"{row.failed} of {row.requests:,} in {row.rollouts} rollouts with {row.reloads} reloads"
        what = f"failed requests, gthread workers, reload plane, {clients} clients"
        yield Row(what, measured, "0" if one_shot else "", row.failed == 0 if one_shot else None)


def processor_time() -> Iterator[Row]:
    """nginx worker CPU for each request, beside native nginx and HAProxy."""
    for servers, limit in ((4, 1.10), (1000, 1.15)):
        native, empty, bare, lua, haproxy = plane_cpu.compare(servers)
        of = f"CPU per request, {servers} servers"
        yield Row(f"{of}: native nginx", f"{native.microseconds:.2f} us", "", None)
        yield Row(f"{of}: HAProxy", f"{haproxy.microseconds:.2f} us, {haproxy.ratio:.3f} x native", "", None)
        for floor in (empty, bare):
            yield Row(f"{of}: {floor.name}", f"{floor.microseconds:.2f} us, {floor.ratio:.3f} x native", "", None)
        measured = f"{lua.microseconds:.2f} us, {lua.ratio:.3f} x native"
        yield Row(f"{of}: Lua plane", measured, f"<= {limit:.2f} x native", lua.ratio <= limit)
        beside = lua.microseconds / haproxy.microseconds
        wanted = "<= 1.10 x HAProxy" if servers == 4 else ""
        yield Row(f"{of}: Lua plane", f"{beside:.3f} x HAProxy", wanted, beside <= 1.10 if wanted else None)
    for way in plane_cpu.compare_ways():
        measured = f"{way.microseconds:.2f} us, {way.ratio:.3f} x native"
        yield Row(f"CPU per request, 4 servers: {way.name}", measured, "<= 1.10 x native", way.ratio <= 1.10)


def draining() -> Iterator[Row]:
    """A thousand drains under load."""
    found = drains.measure()
    yield Row(f"new requests after a drain's answer, {found.drains:,} drains", str(found.late), "0", found.late == 0)
    times = f"{found.p99:.1f} ms (median {found.p50:.1f}, worst {found.worst:.1f})"
    yield Row("drain call, p99", times, "<= 10 ms", found.p99 <= 10)
    failed = f"{found.failed} of {found.requests:,}"
    yield Row("failed requests during these drains", failed, "0", found.failed == 0)


def ramps() -> Iterator[Row]:
    """The share of a warming server."""
    for rate, duration in ((200, 10.0), (50, 40.0)):
        for curve, steps in ((1.0, 0), (2.0, 0), (0.5, 0), (1.0, 16)):
            found = warming.measure(rate, curve, duration, steps)
            measured = f"{found.off:.2%} off ({found.share:.2%} for {found.formula:.2%})"
            shape = f"{steps} steps" if steps else f"curve {curve:g}"
            yield Row(f"warm-up share at {rate} requests/s, {shape}", measured, "<= 2 %", found.off <= 0.02)
    peer = warming.haproxy_slow_start()
    measured = f"{peer.off:.2%} off ({peer.share:.2%} for {peer.formula:.2%})"
    yield Row("HAProxy's slowstart against its own formula", measured, "", None)


def failing() -> Iterator[Row]:
    """Servers that are killed, hang, or flap, beside HAProxy."""
    for word, number in (("killed with -9", signal.SIGKILL), ("that hangs", signal.SIGSTOP)):
        for cost in faults.strike(number):
            ours = cost.balancer == "headgate"
            most = cost.inside if number is signal.SIGSTOP else 0
            what = f"failed GETs, one of 3 servers {word}: {'Headgate' if ours else 'HAProxy'}"
            measured = f"{cost.failed} of {cost.requests:,}, slowest {cost.slowest:.2f} s"
            yield Row(what, measured, f"<= {most}" if ours else "", cost.failed <= most if ours else None)
    found = faults.flap()
    what = f"changes of state of a server that flaps {found.swings} times"
    yield Row(f"{what}: Headgate", str(found.headgate), f"< {2 * found.swings}", found.headgate < 2 * found.swings)
    yield Row(f"{what}: HAProxy", str(found.haproxy), "", None)


def slow() -> Iterator[Row]:
    """One of four servers slowed ten times."""
    for connections in (8, 16):
        rows = slow_server.measure(connections=connections)
        base = next(row.p99 for row in rows if row.name == "round_robin")
        for row in rows:
            better = base / row.p99
            measured = f"p99 {row.p99:.1f} ms, {better:.1f} x better than round robin"
            wanted = ">= 5 x better" if row.name == "ewma" and connections == 8 else ""
            what = f"one of 4 servers slowed 10 x, {connections} connections: {row.name}"
            yield Row(what, measured, wanted, better >= 5 if wanted else None)


def resting() -> Iterator[Row]:
    """A daemon with nothing to do, and one that probes a thousand servers."""
    found = idle.measure()
    yield Row("idle daemon, 10 upstreams: CPU", f"{found.cpu:.2%} of a core", "<= 0.5 %", found.cpu <= 0.005)
    yield Row("idle daemon, 10 upstreams: memory", f"{found.memory:.0f} MB", "<= 90 MB", found.memory <= 90)
    busy = idle.measure(20.0, servers=100, settings=idle.EVERY_SECOND)
    rate = "1,000 servers probed every second"
    yield Row(f"{rate}: CPU", f"{busy.cpu:.1%} of a core", "<= 15 %", busy.cpu <= 0.15)
    yield Row(f"{rate}: memory", f"{busy.memory:.0f} MB", "<= 120 MB", busy.memory <= 120)
    cost = probe_cpu.measure()
    yield Row(f"{rate}, by the prober alone: CPU", f"{cost.cpu:.1%} of a core", "", None)


def storing() -> Iterator[Row]:
    """What people ask of a daemon that remembers a million events."""
    for what, times in store_size.measure().items():
        measured = f"{times.large * 1000:.1f} ms, {times.small * 1000:.1f} ms in a small store"
        name = f"`{what}`, {store_size.EVENTS:,} events and {store_size.CHANGES:,} changes in the store"
        yield Row(name, measured, "<= 100 ms", times.large <= 0.1)


def files() -> Iterator[Row]:
    """A configuration of 3 MB and 10,000 server blocks: taken up, and edited."""
    for count in (1, 1000):
        found = config_speed.measure(count)
        of = f"{found.size / 1e6:.1f} MB of nginx.conf in {count:,} file{'s' * (count > 1)}"
        yield Row(f"{of}: start of the daemon", f"{found.daemon:.2f} s", "<= 3 s", found.daemon <= 3)
        parsed = f"{found.edit * 1000:.0f} ms, {found.parsed} file parsed"
        yield Row(f"{of}: an edit taken up", parsed, "1 file parsed", found.parsed == 1)
    for layout in ("one file", "many files"):
        edits = edit_speed.measure(layout)
        of = f"in {edits.megabytes:.1f} MB, {edits.files:,} file{'s' * (edits.files > 1)}"
        one, many = (max(edits.edits[kind], edits.edits[f"{kind} back"]) for kind in edit_speed.KINDS)
        yield Row(f"one edit and its proof {of}", f"{one:.1f} ms, without a parse", "<= 50 ms", one <= 50)
        yield Row(f"50 edits at once {of}", f"{many:.1f} ms, without a parse", "", None)


def reloads() -> Iterator[Row]:
    """What ten publishes on each plane cost the clients."""
    for row in asyncio.run(reload_cost.measure()):
        what = f"{row.plane} plane, 10 publishes, {row.connections} {row.method}: failed"
        wanted = "" if (row.plane, row.connections) == ("reload", "keep-alive") else "0"
        yield Row(what, f"{row.failed} of {row.answered + row.failed:,}", wanted, row.failed == 0 if wanted else None)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "rollouts": rollouts,
    "operations": operating,
    "reloading-rollouts": reloading_rollouts,
    "cpu": processor_time,
    "drains": draining,
    "ramps": ramps,
    "faults": failing,
    "slow-server": slow,
    "resting": resting,
    "store": storing,
    "files": files,
    "reloads": reloads,
}


def main(names: list[str]) -> int:
    """Measure the named parts (all without a name); exit status 0 when every figure was reached."""
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    rows = [yardstick()]
    for name in names or PARTS:
        with console.status(f"measuring {name} …"):
            rows += PARTS[name]()
    table = Table("what", "measured", "to reach", "")
    for row in rows:
        mark = "" if row.reached is None else "[green]yes[/]" if row.reached else "[red]NO[/]"
        table.add_row(row.what, row.measured, row.wanted, mark)
    console.print(table)
    return 0 if all(row.reached is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
