"""What one slow server costs: p99 of the response times with four servers, one of them ten times slower than the rest.

The methods take turns within one run on the same servers, which wait 10 ms (the slow one 100 ms) and then answer, under
eight connections: two requests in flight for each server. Under 16 the three quick ones have five before them each, and
the slow one is an honest choice. Needs nginx with the Lua module and wrk; HAProxy's rows are
left out where it is not installed.

    python -m tests.bench.slow_server [SECONDS [CONNECTIONS]]
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from tests.bench.plane_cpu import answers, haproxy
from tests.support.nginx import Nginx, free_port, missing_parts, wait_until

QUICK, SLOW = 0.010, 0.100
METHODS = ("round_robin", "least_conn", "ewma")
BALANCE = {"HAProxy roundrobin": "roundrobin", "HAProxy leastconn": "leastconn"}
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True, slots=True)
class Row:
    """A method's response times in milliseconds, and how many requests there were."""

    name: str
    p50: float
    p99: float
    requests: int


def missing() -> str | None:
    """Why the benchmark cannot run here, or None."""
    return missing_parts() or (None if shutil.which("wrk") else "not installed: apt-get install wrk")


def _table(ports: list[int]) -> dict[str, object]:
    server = {"ip": "127.0.0.1", "weight": 1.0, "state": "up", "backup": False, "max_conns": 0}
    servers = [server | {"key": f"127.0.0.1:{port}", "port": port} for port in ports]
    upstreams = {method: {"method": method, "fail_open": False, "servers": servers} for method in METHODS}
    return {"format": 1, "revision": 1, "upstreams": upstreams}


def _http(ports: list[int], fronts: list[int]) -> str:
    blocks = [
        f"server {{ listen 127.0.0.1:{port}; keepalive_requests 1000000000; location / {{ "
        f'content_by_lua_block {{ ngx.sleep({seconds}) ngx.print("ok") }} }} }}'
        for port, seconds in zip(ports, [SLOW, QUICK, QUICK, QUICK], strict=True)
    ]
    lines = " ".join(f"server 127.0.0.1:{port};" for port in ports)
    for method, front in zip(METHODS, fronts, strict=True):
        hook = f'balancer_by_lua_block {{ require("headgate").balance("{method}") }}'
        blocks.append(
            f"upstream {method} {{ {lines} {hook} keepalive 64; }} server {{ listen 127.0.0.1:{front}; "
            f'location / {{ proxy_http_version 1.1; proxy_set_header Connection ""; proxy_pass http://{method}; }} }}'
        )
    return "\n".join(blocks)


def _wrk(name: str, port: int, seconds: int, connections: int) -> Row:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", f"http://127.0.0.1:{port}/"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in told or "Socket errors" in told:
        raise RuntimeError(f"{name}: {told}")
    times = {part: float(n) * _UNITS[unit] for part, n, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s)\b", told)}
    requests = re.search(r"(\d+) requests in", told)
    assert requests is not None, told
    return Row(name, times["50"], times["99"], int(requests[1]))


def measure(seconds: int = 5, connections: int = 8) -> list[Row]:
    """The rows of round robin, least_conn and ewma in nginx, then HAProxy's."""
    ports, fronts = [free_port() for _ in range(4)], [free_port() for _ in METHODS]
    with contextlib.ExitStack() as stack:
        nginx = Nginx(_http(ports, fronts), workers=1)
        stack.callback(nginx.close)
        nginx.snapshot.write_text(json.dumps(_table(ports)))
        nginx.start()
        places = dict(zip(METHODS, fronts, strict=True))
        for name, balance in BALANCE.items() if shutil.which("haproxy") else ():
            places[name] = free_port()
            stack.enter_context(haproxy([f"127.0.0.1:{port}" for port in ports], places[name], balance))
        rows = []
        for name, port in places.items():
            wait_until(lambda port=port: answers(port), f"{name} answers")  # type: ignore[misc]
            _wrk(name, port, 1, connections)
            rows.append(_wrk(name, port, seconds, connections))
        if nginx.errors():
            raise RuntimeError("\n".join(nginx.errors()))
    return rows


if __name__ == "__main__":
    for row in measure(*map(int, sys.argv[1:])):
        print(f"{row.name:<20}p50 {row.p50:6.1f} ms   p99 {row.p99:6.1f} ms   {row.requests:,} requests")
