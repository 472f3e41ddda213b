"""CPU that a balancer's worker spends on one proxied request: native nginx, the Lua plane with everything on, HAProxy.

All are loaded in one run on the same backend, in slices of some hundredths of a second, one after the other: a machine
that is slower for a second is so for all of them. Each figure is the median over the rounds, and what counts are the
ratios to native nginx, each within one round. CPU is the worker's time on a processor as the kernel accounts it
(schedstat, nanoseconds), not throughput: it is steady where throughput is not. The worker has a processor to itself:
where it shares one with its clients, what a request costs depends on how many of them are served at one waking.
Needs nginx with the Lua module, haproxy and wrk.

Between native nginx and the Lua plane stand two rows that no balancer in Lua can do better than: native nginx with the
two hooks that such a balancer needs, both empty, and a hook that does nothing but set the peer.

    python -m tests.bench.plane_cpu [--servers 4] [--rounds 15] [--seconds 1] [--ways]

`--ways` compares each method, and everything at once, with the same method of native nginx (round robin where it has
none), on 4 servers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.nginx import Nginx, free_port, missing_parts, wait_until

EMPTY = "balancer_by_lua_block { }"
EMPTY_LOG = "log_by_lua_block { }"
BARE = 'balancer_by_lua_block {{ require("ngx.balancer").set_current_peer("{ip}", {port}) }}'
BACKEND = 'server {{ listen {port}; keepalive_requests 1000000000; location / {{ return 200 "ok"; }} }}'


SLICE = 0.03  # seconds


@dataclass(frozen=True)
class Row:
    """One balancer: median microseconds of CPU per request, the spread of the rounds, and the ratio to native nginx."""

    name: str
    microseconds: float
    low: float
    high: float
    ratio: float


@dataclass(frozen=True)
class Target:
    """A running balancer: where it listens, the process whose CPU counts, and a script of what wrk sends, if any."""

    name: str
    port: int
    pid: int
    script: str = ""


@dataclass(frozen=True)
class Way:
    """A way to balance: what the Lua plane's table says of it, and native nginx's directive."""

    name: str
    native: str
    upstream: dict[str, object]
    servers: dict[str, object] = field(default_factory=dict)
    ramp: dict[str, object] | None = None
    sticky: bool = False


STICKY = {"cookie": "route", "path": "/", "secure": True, "http_only": True, "same_site": "Lax", "max_age": 3600}
RAMP = {"epoch": 1, "elapsed_ms": 1, "duration_ms": 3_600_000, "curve": 2.0, "floor": 0.1, "starts": "first-request"}
WAYS = (
    Way(
        "sticky, max_conns, a ramp, ignored paths",
        "",
        {"method": "round_robin", "sticky": STICKY, "ignore_paths": ["/healthz", "/ready"]},
        {"max_conns": 1000},
        {**RAMP, "held": False},
        sticky=True,
    ),
    Way("least_conn", "least_conn;", {"method": "least_conn"}),
    Way("ewma", "", {"method": "ewma"}),
    Way("hash", "hash $request_id consistent;", {"method": "hash", "key": "$request_id", "consistent": True}),
    Way("random two", "random two least_conn;", {"method": "random", "two": True}),
)


def missing() -> str | None:
    """Why the benchmark cannot run here, or None."""
    absent = [tool for tool in ("haproxy", "wrk") if shutil.which(tool) is None]
    return missing_parts() or (f"not installed: apt-get install {' '.join(absent)}" if absent else None)


def addresses(servers: int) -> list[str]:
    """Distinct loopback addresses; one backend that listens on all of 127.0.0.0/8 serves them."""
    return [f"127.0.{1 + i // 250}.{1 + i % 250}" for i in range(servers)]


def table(ips: list[str], port: int) -> dict[str, object]:
    """A table with these servers under equal weights, and all that watches their answers."""
    servers = [
        {"key": f"{ip}:{port}", "ip": ip, "port": port, "weight": 1.0, "state": "up", "backup": False, "max_conns": 0}
        for ip in ips
    ]
    outlier = {"errors": 5, "timeouts": 5, "server_errors": 5, "base_ms": 30000, "cap_ms": 300000, "max_ejected": 0.5}
    watch = {"outlier": outlier, "quarantine_ms": 120000}
    upstream = {"method": "round_robin", "fail_open": False, "servers": servers, **watch}
    return {"format": 1, "revision": 1, "upstreams": {"app": upstream}}


def ways_table(ips: list[str], port: int) -> dict[str, object]:
    """A table with an upstream for each way, with all that watches the answers."""
    plain: Any = table(ips, port)
    app = plain["upstreams"]["app"]
    upstreams = {}
    for number, way in enumerate(WAYS):
        servers = [server | way.servers for server in app["servers"]]
        if way.ramp:
            servers[0] |= {"warm_up": way.ramp}
        upstreams[f"way{number}"] = {**app, **way.upstream, "servers": servers}
    return {**plain, "upstreams": upstreams}


def cookies(ips: list[str], port: int) -> list[str]:
    """One request after the other: nine of ten belong to a session, with each server in turn, "" begins a new one."""
    known = [f"route={hashlib.md5(f'{ip}:{port}'.encode()).hexdigest()}" for ip in ips]
    return [known[number % len(known)] if number % 10 else "" for number in range(10 * len(known))]


def sessions(ips: list[str], port: int) -> str:
    """The same as a script for wrk."""
    return (
        f"local cookies, sent, made = {{ {', '.join(map(json.dumps, cookies(ips, port)))} }}, 0, {{}}\n"
        'function init() for i, cookie in ipairs(cookies) do made[i] = wrk.format("GET", "/", '
        'cookie ~= "" and { Cookie = cookie } or {}) end end\n'
        "function request() sent = sent % #made + 1; return made[sent] end\n"
    )


def nginx_http(ips: list[str], backend: int, port: int, hook: str, name: str = "app") -> str:
    """The proxying http{} content; the same for both nginx rows but for the hook, or the directive of a method."""
    lines = "\n".join(f"server {ip}:{backend};" for ip in ips)
    return (
        f"upstream {name} {{ {lines}\n{hook}\nkeepalive {max(64, 2 * len(ips))}; keepalive_requests 1000000000; }}\n"
        f"server {{ listen 127.0.0.1:{port}; keepalive_requests 1000000000;\n"
        'location / { proxy_http_version 1.1; proxy_set_header Connection ""; '
        f"proxy_pass http://{name}; }} }}\n"
    )


@contextlib.contextmanager
def haproxy(addresses: list[str], port: int, balance: str = "roundrobin") -> Iterator[int]:
    """HAProxy with one thread, pooled server connections and no logs; yields its pid."""
    servers = "\n".join(f"  server s{i} {address} pool-max-conn -1" for i, address in enumerate(addresses))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "haproxy.cfg"
        path.write_text(
            "global\n  nbthread 1\n  maxconn 4096\n"
            "defaults\n  mode http\n  http-reuse always\n"
            "  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
            f"frontend in\n  bind 127.0.0.1:{port}\n  default_backend app\n"
            f"backend app\n  balance {balance}\n{servers}\n"
        )
        command = ["haproxy", "-db", "-f", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """Time that a process has spent on a processor."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def load(target: Target, seconds: int, connections: int = 16) -> subprocess.Popen[str]:
    """wrk on the target's port, over keep-alive connections, for so many seconds from now."""
    script = ["-s", target.script] if target.script else []
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *script, f"http://127.0.0.1:{target.port}/"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def requests_of(target: Target, said: str) -> int:
    """How many requests wrk says that it has made; all must have succeeded."""
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{target.name}: {said}")
    requests = re.search(r"(\d+) requests in", said)
    assert requests is not None, said
    return int(requests[1])


def one_round(targets: list[Target], seconds: int) -> list[float]:
    """Microseconds of each target's CPU per request, of all in turns by slices, so many seconds for each."""
    loads = [load(target, seconds * len(targets)) for target in targets]
    spent, counted = [0.0] * len(targets), [0] * len(targets)
    try:
        for each in loads:
            each.send_signal(signal.SIGSTOP)
        end, ending = time.monotonic() + seconds * len(targets), False
        while not ending:
            ending = time.monotonic() > end
            for i, (target, each) in enumerate(zip(targets, loads, strict=True)):
                before = cpu_seconds(target.pid)
                each.send_signal(signal.SIGCONT)
                if ending:
                    counted[i] = requests_of(target, each.communicate()[0])
                else:
                    time.sleep(SLICE)
                    each.send_signal(signal.SIGSTOP)
                spent[i] += cpu_seconds(target.pid) - before
    finally:
        for each in loads:
            each.kill()
            each.wait()
    return [used / requests * 1e6 for used, requests in zip(spent, counted, strict=True)]


def answers(port: int) -> bool:
    """Does a balancer serve the backend's response?"""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1) as response:
            return bool(response.read() == b"ok")
    except OSError:
        return False


def compare(servers: int = 4, rounds: int = 15, seconds: int = 1) -> list[Row]:
    """Measure them in turns; rows in the order native, empty hooks, a hook that only sets the peer, lua, haproxy."""
    ips, backend = addresses(servers), free_port()
    ports = [free_port() for _ in range(5)]
    hook = 'balancer_by_lua_block { require("headgate").balance("app") }'
    with contextlib.ExitStack() as stack:
        answering = stack.enter_context(Nginx(BACKEND.format(port=backend), workers=1, plane=False))
        native = stack.enter_context(Nginx(nginx_http(ips, backend, ports[0], ""), workers=1, plane=False))
        hooks = f"{EMPTY_LOG}\n{nginx_http(ips, backend, ports[4], EMPTY)}"
        empty = stack.enter_context(Nginx(hooks, workers=1, plane=False))
        setting = nginx_http(ips, backend, ports[3], BARE.format(ip=ips[0], port=backend))
        bare = stack.enter_context(Nginx(setting, workers=1))
        lua = Nginx(nginx_http(ips, backend, ports[1], hook), workers=1)
        lua.snapshot.write_text(json.dumps(table(ips, backend)))
        stack.enter_context(lua)
        proxy = stack.enter_context(haproxy([f"{ip}:{backend}" for ip in ips], ports[2]))
        targets = [
            Target("native nginx", ports[0], native.workers()[0]),
            Target("native nginx with two empty hooks", ports[4], empty.workers()[0]),
            Target("a hook that only sets the peer", ports[3], bare.workers()[0]),
            Target("Lua plane", ports[1], lua.workers()[0]),
            Target("HAProxy", ports[2], proxy),
        ]
        figures = _in_turns(targets, rounds, seconds, lua, answering)
    return [_row(name, values, figures["native nginx"]) for name, values in figures.items()]


def compare_ways(rounds: int = 15, seconds: int = 1) -> list[Row]:
    """Measure each way in turns with native nginx's; rows of the Lua plane, each against native nginx's same method."""
    ips, backend = addresses(4), free_port()
    ports = [(free_port(), free_port()) for _ in WAYS]
    natives, ours = "", ""
    for number, (way, (native_port, lua_port)) in enumerate(zip(WAYS, ports, strict=True)):
        hook = f'balancer_by_lua_block {{ require("headgate").balance("way{number}") }}'
        natives += nginx_http(ips, backend, native_port, way.native, f"way{number}")
        ours += nginx_http(ips, backend, lua_port, hook, f"way{number}")
    with contextlib.ExitStack() as stack:
        answering = stack.enter_context(Nginx(BACKEND.format(port=backend), workers=1, plane=False))
        native = stack.enter_context(Nginx(natives, workers=1, plane=False))
        lua = Nginx(ours, workers=1)
        lua.snapshot.write_text(json.dumps(ways_table(ips, backend)))
        stack.enter_context(lua)
        script = lua.prefix / "sessions.lua"
        script.write_text(sessions(ips, backend))
        targets = [
            Target(f"{plane}{way.name}", port, of.workers()[0], str(script) if way.sticky else "")
            for way, both in zip(WAYS, ports, strict=True)
            for plane, of, port in zip(("native ", ""), (native, lua), both, strict=True)
        ]
        figures = _in_turns(targets, rounds, seconds, lua, answering)
    return [_row(way.name, figures[way.name], figures[f"native {way.name}"]) for way in WAYS]


@contextlib.contextmanager
def apart(pids: Iterable[int], others: Iterable[int]) -> Iterator[None]:
    """Give these processes one processor, this one with all that it starts, and the others, the rest of them."""
    mine = os.sched_getaffinity(0)
    first, *rest = sorted(mine)
    for pid in pids if rest else ():
        os.sched_setaffinity(pid, {first})
    for pid in (0, *others) if rest else ():
        os.sched_setaffinity(pid, rest)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def _in_turns(targets: list[Target], rounds: int, seconds: int, lua: Nginx, backend: Nginx) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {target.name: [] for target in targets}
    with apart({target.pid for target in targets}, backend.workers()):
        for target in targets:
            wait_until(lambda port=target.port: answers(port), f"{target.name} answers")  # type: ignore[misc]
        for number in range(-1, rounds):
            for target, value in zip(targets, one_round(targets, seconds), strict=True):
                if number >= 0:  # the round before the first warms up
                    figures[target.name].append(value)
    if lua.errors():
        raise RuntimeError("\n".join(lua.errors()))
    return figures


def _row(name: str, values: list[float], base: list[float]) -> Row:
    """Each round has a ratio of its own: a machine that is slower for some seconds is so for both."""
    ratio = statistics.median(value / native for value, native in zip(values, base, strict=True))
    return Row(name, statistics.median(values), min(values), max(values), ratio)


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=1)
    parser.add_argument("--ways", action="store_true")
    options = parser.parse_args()
    reason = missing()
    if reason:
        raise SystemExit(reason)
    servers = 4 if options.ways else options.servers
    print(f"worker CPU per proxied request, {servers} servers, medians of {options.rounds} rounds")
    rows = compare_ways if options.ways else functools.partial(compare, servers)
    for row in rows(options.rounds, options.seconds):
        print(f"{row.name:<42}{row.microseconds:7.2f} us  ({row.low:.2f}-{row.high:.2f})  {row.ratio:.3f} x native")


if __name__ == "__main__":
    main()
